# SPDX-License-Identifier: Apache-2.0
"""The self-test passes here, and fails where an operator gives another number."""

import json

import pytest
import torch

from fastdense import _C, ops, selftest
from fastdense.cli import main


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


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "expected device to be usable" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected device to be cpu or cuda, got 'meta'"):
        next(selftest.run("meta"))
