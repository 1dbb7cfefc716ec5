# SPDX-License-Identifier: Apache-2.0
"""The self-test passes here, and fails where an operator gives another number."""

import json
import re

import pytest
import torch

from fastdense import _C, ops, selftest
from fastdense._selftest_cases import ROUNDED_TO_TF32
from fastdense.cli import main
from tests.emulation.blocks import chosen, emulated_kernels

TF32 = ("float32", "tf32")


def names(operator: str) -> list[selftest.Check]:
    return [check for check in selftest.run() if check.name == operator]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(selftest, "NETWORKS", {})
    monkeypatch.setattr(selftest, "OPERATORS", {"mean_join": selftest.OPERATORS["mean_join"]})


def test_everything_passes_here(capsys):
    simd = _C.build_info()["simd"]
    assert main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*selftest.OPERATORS, *selftest.NETWORKS])
    assert "FAILED" not in out
    assert _C.build_info()["simd"] == simd


def test_a_wrong_number_fails_and_names_what_avoids_it(few, monkeypatch, capsys):
    right = ops.mean_join
    monkeypatch.setattr(ops, "mean_join", lambda inputs: right(inputs) * (1 + 1e-6))
    assert main(["selftest", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    wrong = [row for row in rows if not row["ok"]]
    assert {row["dtype"] for row in wrong} == {"float64", "float32"}  # 16-bit types do not resolve it
    assert all("expected at most" in row["problem"] and "avoids" in row["problem"] for row in wrong)
    assert any("FASTDENSE_SIMD=" in row["problem"] for row in wrong) == (_C.build_info()["simd"] != "baseline")


def test_an_operator_that_raises_is_one_failed_check(few, monkeypatch, capsys):
    def refuse(inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "mean_join", refuse)
    assert main(["selftest"]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_runs_that_differ_fail(few, monkeypatch):
    right, calls = ops.mean_join, []

    def change(inputs):
        calls.append(1)
        return right(inputs) * (1 + 1e-14 * len(calls))

    monkeypatch.setattr(ops, "mean_join", change)
    assert "other bits" in names("mean_join")[0].problem


def test_what_passes_a_nan_on_fails(few, monkeypatch):
    right = ops.mean_join
    monkeypatch.setattr(ops, "mean_join", lambda inputs: right(inputs) * float("nan"))
    assert not any(check.ok for check in names("mean_join"))


@pytest.mark.parametrize("kernels", ["auto", "fused", "library"])
def test_a_gpu_runs_what_the_environment_chose(kernels):
    """Where fused kernels crash, the self-test can be asked about the others alone."""
    with chosen(kernels):
        checks = [what for what, _ in selftest._checks("cuda")]
    expected = {"fused", "library"} if kernels == "auto" else {kernels}
    assert {what[-1] for what in checks if "float64" not in what and what[0] not in selftest.NETWORKS} == expected
    assert {what[-1] for what in checks if "float64" in what} == {"library"}
    assert any("tf32" in what for what in checks)


@pytest.mark.parametrize("name", ROUNDED_TO_TF32)
def test_products_in_tf32_pass_as_such_and_fail_as_float32(name):
    """The GPU's fused code, emulated: here it rounds factors, and plain PyTorch does not."""
    with emulated_kernels(False, 1 << 24, 8, "fused", tf32=True):
        found = {t: selftest._check_operator(name, selftest.OPERATORS[name](), "cpu", t, "fused") for t in TF32}
    assert found["tf32"].ok, found["tf32"].problem
    assert "expected at most" in found["float32"].problem


def test_libraries_are_as_they_were():
    def flags() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    for tf32 in (False, True):
        with selftest._repeatable(tf32):
            assert flags() == (True, False, tf32, tf32)
    assert flags() == before


def test_a_file_gets_the_checks_beside_the_table(few, folder, capsys):
    assert main(["selftest", "--json", "checks.json"]) == 0
    rows = json.loads((folder / "checks.json").read_text())
    assert len(rows) == selftest.count_checks("cpu") and all(row["ok"] for row in rows)
    assert f"{len(rows)} of {len(rows)} checks passed" in capsys.readouterr().out
    assert main(["selftest", "--json", "."]) == 2  # a folder


def test_verbose_says_what_begins(few, capsys):
    assert main(["selftest", "--verbose"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"mean_join, float64, baseline \.\.\. ok \(\d+\.\d s\)", lines[0])


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "expected device to be usable" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected device to be cpu or cuda, got 'meta'"):
        next(selftest.run("meta"))
