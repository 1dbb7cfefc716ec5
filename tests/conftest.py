# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: fixed seeds and the device axis."""

import gc
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy
import pytest
import torch

from tests.cases import forks
from tests.cases.processes import Processes

# oneDNN's bfloat16 kernels for AMX read past the last channel of a strided view: what lies there, NaN perhaps, is
# multiplied by zero. The emulated CUDA code convolves such views; fastdense's CPU code does not.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# A shell starts what runs in the background deaf to Ctrl-C, and so would be the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same few examples in every run, or many new ones: make fuzz.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("few", patient, max_examples=80, derandomize=True, database=None)
hypothesis.settings.register_profile("fuzz", patient, max_examples=3000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

# Without a GPU torch looks for the driver at each question; this spares it that, a hundred thousand times.
if not torch.cuda.is_available():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(needs_cuda)


def pytest_collection_finish() -> None:
    """Leaves what is imported out of every later search for garbage: millions of objects of torch and others."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_libraries() -> Iterator[None]:
    """On a GPU cuDNN gives the same bits on every run, and keeps float32 as it is; tests of TF32 say so."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_thread():
    """The nets are too small for more; on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes, for as long as any test asks for them."""
    pair = Processes()
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Those of a benchmark do not import torch anew; tests/test_cli.py has one whose workers start as users' do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdense.bench.process.subprocess", SimpleNamespace(PIPE=subprocess.PIPE, Popen=forks.Popen))
        yield
