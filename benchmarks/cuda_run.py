# SPDX-License-Identifier: Apache-2.0
"""Builds, checks and measures on a machine with a CUDA GPU, within ten minutes a run.

    python -m benchmarks.cuda_run --out DIR            the first run: is it right, and how fast is a DenseNet
    python -m benchmarks.cuda_run --out DIR --second   the second, behind the first: other networks, kernels
                                                       that start early, compiled rivals

What matters most comes first. Every stage is a process of its own with a time limit, and goes on where another failed;
where fused kernels do not pass ``fastdense selftest``, compute-sanitizer looks at them if it is there, and later stages
run with the library's. A stage that reaches its limit says where it was, and ends with all that it started. All
together take ``--seconds`` at most. ``DIR`` ($OUT, or build/cuda) gets ``run.log``, with the output of all stages as it
comes, and ``results.json``, written anew after every stage. The exit code is 0 when all stages went well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
STAGE = (PYTHON, "-m", "benchmarks.cuda_stages")
# A variant that hangs is given up, and the others are timed.
BENCH = (PYTHON, "-m", "fastdense", "bench", "--device", "cuda", "--memory-batches", "0", "--steps", "20")
BENCH += ("--timeout", "60")
COMPILE = (*BENCH, "--timeout", "120")
SELFTEST = (PYTHON, "-m", "fastdense", "selftest", "--device", "cuda", "--verbose", "--json", "{json}")
BFLOAT16 = ("--dtype", "bfloat16")
DPN92 = ("--model", "dpn92", "--batch", "128")
EARLY = ("env", "FASTDENSE_DEPENDENT_LAUNCH=1")
# The self-test of fused kernels, each allocation by itself and each access of ours checked.
ALONE = ("env", "FASTDENSE_CUDA_KERNELS=fused", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
MEMCHECK = ("--tool", "memcheck", "--kernel-regex", "kns=fastdense", "--error-exitcode", "1")
LEAST_SECONDS = 3  # that are worth the start of a stage
GRAPHS = "plain-channels-last,plain-channels-last-graph,balanced,balanced-graph"


class Stage(NamedTuple):
    """A command, and for how many seconds it may run; ``{json}`` stands for a file that becomes its result."""

    name: str
    seconds: int
    command: tuple[str, ...]


FIRST = (
    Stage("build", 240, (PYTHON, "setup.py", "-q", "build_ext", "--inplace")),
    Stage("selftest", 100, SELFTEST),
    Stage("kernels", 90, (*STAGE, "kernels", "--json", "{json}")),
    Stage("layers", 60, (PYTHON, "-m", "benchmarks.cuda_kernels", "--json", "{json}")),
    Stage("densenet121-64", 120, (*BENCH, *BFLOAT16, "--batch", "64", "--variants", GRAPHS, "--json", "{json}")),
    Stage(
        "densenet121-256",
        120,
        (*BENCH, *BFLOAT16, "--batch", "256", "--variants", "plain-channels-last,balanced,min", "--json", "{json}"),
    ),
    Stage("memory", 45, (*STAGE, "memory", "--json", "{json}")),
    Stage("tests", 150, (*STAGE, "tests")),
)
SECOND = (
    Stage("build", 240, (PYTHON, "setup.py", "-q", "build_ext", "--inplace")),
    Stage("super-resolution", 50, (*STAGE, "super_resolution", "--json", "{json}")),
    Stage("bicubic", 30, (*STAGE, "bicubic", "--json", "{json}")),
    Stage("dependent-selftest", 100, (*EARLY, *SELFTEST)),
    Stage(
        "dependent-densenet121-64",
        100,
        (*EARLY, *BENCH, *BFLOAT16, "--batch", "64", "--variants", "balanced,balanced-graph", "--json", "{json}"),
    ),
    Stage(
        "dpn92-128",
        120,
        (*BENCH, *BFLOAT16, *DPN92, "--variants", "plain-channels-last,balanced", "--json", "{json}"),
    ),
    Stage(
        "densenet121-compile",
        150,
        (*COMPILE, *BFLOAT16, "--batch", "64", "--variants", "compile,balanced,balanced-graph", "--json", "{json}"),
    ),
    Stage(
        "densenet201-64",
        120,
        (*BENCH, *BFLOAT16, "--model", "densenet201", "--batch", "64", "--variants", GRAPHS, "--json", "{json}"),
    ),
)


def processes_of(session: int) -> list[int]:
    """The processes of a session that still run, whatever groups of it they made."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, _, of, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX" and int(of) == session:
                found.append(int(path.parent.name))
    return found


def end(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """Ends a process that leads a session, with all that it started; Python says first where it was."""
    for number in (signal.SIGABRT, signal.SIGKILL):  # the first is what PYTHONFAULTHANDLER answers
        for found in processes_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, number)
        until = time.monotonic() + grace
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.02)
    process.poll()


class Report:
    """What the stages found; both files are whole whenever the run is cut off."""

    def __init__(self, out: Path, clock: Callable[[], float] = time.monotonic, seconds: float = 570) -> None:
        self.out = out
        self.clock = clock
        self.end = clock() + seconds
        self.stages: dict[str, dict[str, Any]] = {}
        self.environment: dict[str, str] = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "FORCE_CUDA": "1"}
        self.environment["TORCH_CUDA_ARCH_LIST"] = ""  # the GPU that is here, whatever an image is set up for
        out.mkdir(parents=True, exist_ok=True)
        self.log = open(out / "run.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (until the end)

    def run(self, stage: Stage) -> bool:
        """Runs a stage to its end or its limit, or that of all stages."""
        start = self.clock()
        seconds = min(stage.seconds, int(self.end - start))
        if seconds < LEAST_SECONDS:
            self.note(stage.name, {"ok": False, "code": None, "seconds": 0.0, "reason": "no time was left"})
            return False
        result = self.out / "stage.json"
        result.unlink(missing_ok=True)
        command = [part.replace("{json}", str(result)) for part in stage.command]
        self.log.write(f"\n===== {stage.name}: {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)  # what a stage left running would disturb the next
        found: dict[str, Any] = {"ok": code == 0, "code": code, "seconds": self.clock() - start}
        if code is None:
            found["reason"] = f"ended after {seconds} seconds"
        if result.exists():
            try:
                found["result"] = json.loads(result.read_text(encoding="utf-8"))
            except ValueError:
                found["reason"] = "the result is no JSON"
            result.unlink()
        self.note(stage.name, found)
        return code == 0

    def note(self, name: str, found: dict[str, Any]) -> None:
        self.stages[name] = found
        said = {key: value for key, value in found.items() if key != "result"}
        for target in (sys.stdout, self.log):
            print(f"{name}: {said}", file=target, flush=True)
        partial = self.out / "results.partial"
        partial.write_text(
            json.dumps({"environment": self.environment, "stages": self.stages}, indent=2), encoding="utf-8"
        )
        partial.replace(self.out / "results.json")


def blames_fused(checks: list[dict[str, Any]] | None) -> bool:
    """Whether a self-test that failed speaks against the fused kernels; one that did not end may."""
    return checks is None or any(check["kernels"] == "fused" and not check["ok"] for check in checks)


def go_through(report: Report, stages: tuple[Stage, ...]) -> bool:
    """All stages in their order; whether all went well."""
    good = True
    for stage in stages:
        ok = report.run(stage)
        good &= ok
        if stage.name == "build" and not ok:
            return False
        if stage.name == "selftest" and not ok and blames_fused(report.stages[stage.name].get("result")):
            report.environment["FASTDENSE_CUDA_KERNELS"] = "library"
            report.run(stage._replace(name="selftest-library"))
            if tool := shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"):
                report.run(Stage("sanitizer", 90, (*ALONE, tool, *MEMCHECK, *stage.command)))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "cuda")))
    parser.add_argument("--second", action="store_true", help="the second run")
    parser.add_argument("--stages", metavar="A,B", help="only these stages of it")
    parser.add_argument("--seconds", type=int, default=570, help="for all stages together (default: %(default)s)")
    options = parser.parse_args()
    stages = SECOND if options.second else FIRST
    if options.stages:
        chosen = options.stages.split(",")
        names = [stage.name for stage in stages]
        if unknown := [name for name in chosen if name not in names]:
            parser.error(f"expected --stages to be from {','.join(names)}, got {unknown[0]}")
        stages = tuple(stage for stage in stages if stage.name in chosen)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is ended writes no core files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a stage does not outlive this process
    return 0 if go_through(Report(options.out.resolve(), seconds=options.seconds), stages) else 1


if __name__ == "__main__":
    sys.exit(main())
