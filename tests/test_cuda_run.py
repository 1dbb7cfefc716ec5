# SPDX-License-Identifier: Apache-2.0
"""How a run on a GPU machine goes on where a stage fails or hangs; which GPUs a wheel is for; the model of times."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import cuda_kernels, cuda_model, cuda_stages, grouped_conv_model
from benchmarks.cuda_run import Report, Stage, go_through
from tests.emulation.blocks import chosen as chosen_kernels

ROOT = Path(__file__).resolve().parents[1]


def python(name: str, code: str, seconds: int = 60) -> Stage:
    return Stage(name, seconds, (sys.executable, "-c", code, "{json}"))


def results(out: Path) -> dict[str, dict[str, object]]:
    return json.loads((out / "results.json").read_text())["stages"]


def test_a_stage_that_hangs_ends_with_what_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1); time.sleep(60)'])"
    report = Report(tmp_path)
    assert not report.run(python("hangs", child, seconds=3))
    assert report.run(python("next", "print('said')"))
    found = results(tmp_path)
    assert found["hangs"]["reason"] == "ended after 3 seconds"
    assert found["hangs"]["seconds"] < 30
    assert found["next"]["ok"]
    assert "said" in (tmp_path / "run.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run.log"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# A child that leads a group of its own, as the workers of a benchmark do, and says who it is.
CHILD = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], process_group=0); "
    "print('child', child.pid, flush=True); "
)


def child_of(out: Path) -> int:
    return int((out / "run.log").read_text().rpartition("\nchild ")[2].split()[0])


def test_groups_of_a_stage_end_with_it(tmp_path):
    report = Report(tmp_path)
    assert not report.run(python("hangs", CHILD + "time.sleep(60)", seconds=3))
    assert not is_running(child_of(tmp_path))
    assert "most recent call first" in (tmp_path / "run.log").read_text()  # where it hung
    assert report.run(python("leaves one behind", CHILD))
    assert not is_running(child_of(tmp_path))


def test_all_stages_together_have_a_limit(tmp_path):
    now = [0.0]
    report = Report(tmp_path, clock=lambda: now[0], seconds=20)
    now[0] = 17.0
    assert not report.run(python("hangs", "import time; time.sleep(60)"))
    now[0] = 18.0
    assert not report.run(python("next", "pass"))
    found = results(tmp_path)
    assert found["hangs"]["reason"] == "ended after 3 seconds"
    assert found["next"]["reason"] == "no time was left"


def test_a_run_that_is_ended_ends_its_stage(tmp_path):
    code = f"""
import sys
from pathlib import Path
from benchmarks import cuda_run
cuda_run.FIRST = (cuda_run.Stage("hangs", 60, (sys.executable, "-c", {CHILD + "time.sleep(60)"!r})),)
sys.argv = ["cuda_run", "--out", {str(tmp_path)!r}]
sys.exit(cuda_run.main())
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while "\nchild " not in ((tmp_path / "run.log").read_text() if (tmp_path / "run.log").exists() else ""):
        assert run.poll() is None
        time.sleep(0.05)
    run.terminate()
    assert run.wait(timeout=30) == 1
    assert not is_running(child_of(tmp_path))


def test_results_of_stages_are_kept(tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({!r})"
    report = Report(tmp_path)
    assert report.run(python("good", write.format('{"ms": 1.5}')))
    assert report.run(python("cut", write.format('{"ms": ')))
    found = results(tmp_path)
    assert found["good"]["result"] == {"ms": 1.5}
    assert found["cut"]["reason"] == "the result is no JSON"


def test_the_rest_runs_with_the_librarys_kernels_where_the_selftest_fails(tmp_path):
    say = "import os, sys; print('chosen', os.environ.get('FASTDENSE_CUDA_KERNELS')); sys.exit({})"
    report = Report(tmp_path)
    report.environment.pop("FASTDENSE_CUDA_KERNELS", None)
    stages = (python("build", "pass"), python("selftest", say.format(1)), python("kernels", say.format(0)))
    assert not go_through(report, stages)
    assert [(name, stage["ok"]) for name, stage in results(tmp_path).items()] == [
        ("build", True),
        ("selftest", False),
        ("selftest-library", False),
        ("kernels", True),
    ]
    assert (tmp_path / "run.log").read_text().count("chosen library") == 2


def test_a_sanitizer_looks_at_fused_kernels_that_fail(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho sanitized $FASTDENSE_CUDA_KERNELS $PYTORCH_NO_CUDA_MEMORY_CACHING $*\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    go_through(Report(tmp_path / "out"), (python("selftest", "raise SystemExit(1)"),))
    assert list(results(tmp_path / "out")) == ["selftest", "selftest-library", "sanitizer"]
    said = (tmp_path / "out" / "run.log").read_text().rpartition("\nsanitized ")[2]
    assert said.startswith("fused 1 --tool memcheck --kernel-regex kns=fastdense")
    assert "raise SystemExit(1)" in said


@pytest.mark.parametrize(
    ("failed", "chosen"), [(["library"], ["None"]), (["library", "fused"], ["library"] * 2), (None, ["library"] * 2)]
)
def test_what_failed_beside_the_fused_kernels_does_not_rule_them_out(tmp_path, failed, chosen):
    checks = failed and [{"kernels": kernels, "ok": False} for kernels in failed] + [{"kernels": "fused", "ok": True}]
    write = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps(checks)!r}); sys.exit(1)"
    say = "import os; print('chosen', os.environ.get('FASTDENSE_CUDA_KERNELS'))"
    report = Report(tmp_path)
    selftest = python("selftest", f"{say}; {write}" if checks else f"{say}; raise SystemExit(1)")
    go_through(report, (selftest, python("kernels", say)))
    assert re.findall(r"^chosen (\w+)$", (tmp_path / "run.log").read_text(), re.MULTILINE) == ["None", *chosen]


def test_nothing_runs_where_the_build_fails(tmp_path):
    assert not go_through(Report(tmp_path), (python("build", "raise SystemExit(1)"), python("kernels", "pass")))
    assert list(results(tmp_path)) == ["build"]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("compute_75 compute_80 compute_86 compute_90 compute_100 compute_120", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ("compute_70\ncompute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\n", "7.5;8.0;8.6;9.0+PTX"),
        ("", ""),
    ],
)
def test_a_wheel_is_for_all_gpus_that_nvcc_knows(known, expected):
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "release" / "wheels.py")
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    assert wheels.architectures(known) == expected


def test_measured_kernels_are_those_of_the_model_and_of_the_sources(capsys):
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    predicted = cuda_model.milliseconds(cuda_model.network("densenet121", 64, True))
    for part, name in cuda_stages.NAMES.items():
        assert re.search(rf"\b{part}\b", sources), part
        assert name in predicted
    kernels = [{"kernel": f"void fastdense::{part}<float, 128>(Params)", "ms": 0.5} for part in cuda_stages.NAMES]
    kernels.append({"kernel": "void fastdense::grouped_conv_forward_kernel<float>(Params)", "ms": 4.0})  # not of it
    table = cuda_stages.compared(predicted, {"kernels": kernels, "ms": 9.0})
    assert [row["measured"] for row in table] == [0.5] * len(kernels[:-1])
    assert "9.00" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("chosen", "expected"), [("auto", ("fused", "library")), ("fused", ("fused", "library")), ("library", ("library",))]
)
def test_what_the_selftest_ruled_out_is_not_timed(chosen, expected):
    with chosen_kernels(chosen):
        assert cuda_kernels.choices_here() == expected


def test_predicted_times_grow_with_the_work():
    def total(name: str, batch: int, train: bool) -> float:
        return sum(cuda_model.milliseconds(cuda_model.network(name, batch, train)).values())

    assert 2 * total("densenet121", 64, True) < total("densenet121", 256, True) < 4 * total("densenet121", 64, True)
    assert total("densenet121", 64, True) < total("densenet201", 64, True)
    assert 2 * total("densenet121", 64, False) < total("densenet121", 64, True)


def test_a_kernel_that_streams_takes_its_bytes():
    """4.3 GB at 4.3 TB/s are a millisecond, at 80 % of that one and a quarter."""
    assert cuda_model.stream(4.3e9) == pytest.approx(1.25e-3)


def test_which_grouped_convolutions_the_count_favours():
    """As csrc/cuda/grouped_conv/grouped_conv.h chooses, see test_which_grouped_convolutions_are_fused."""
    chosen = {
        (size, exact): [g for g in grouped_conv_model.CHANNELS if grouped_conv_model.is_default(g, size, exact)]
        for size, exact in ((2, False), (4, False), (4, True))
    }
    everything = list(grouped_conv_model.CHANNELS)
    assert chosen == {(2, False): everything, (4, False): [2, 3, 4, 6, 8, 12], (4, True): everything}
    assert [grouped_conv_model.window(g) for g in (2, 3, 8, 12, 16, 24, 32)] == [1, 3, 1, 3, 2, 3, 4]
