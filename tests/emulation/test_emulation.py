# SPDX-License-Identifier: Apache-2.0
"""The emulation finds what a kernel may do wrong."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.emulation import build
from tests.emulation.build import HERE, load

FAULTS = ["none", "no barrier", "skipped barrier", "other barrier", "other shuffle", "before", "behind", "misaligned"]
FAULTS += ["unwritten", "read behind", "early access", "no wait"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = load({HERE / "faults_entry.cpp": None})
    library.run_sum.restype = ctypes.c_char_p
    return library


def run_sum(library: ctypes.CDLL, fault: str, backwards: bool) -> tuple[str, bool]:
    """What the launch says, and whether the sums are right."""
    values, out = torch.arange(64.0), torch.zeros(64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
    reason = library.run_sum(*pointers, FAULTS.index(fault), ctypes.c_bool(backwards)).decode()
    return reason, bool((out == values.sum()).all())


@pytest.mark.parametrize("backwards", [False, True])
def test_a_sound_kernel_runs(library, backwards):
    assert run_sum(library, "none", backwards) == ("", True)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("skipped barrier", "not met by all threads"),
        ("other barrier", "different barriers"),
        ("other shuffle", "different barriers or collectives"),
        ("before", "outside shared memory"),
        ("behind", "outside shared memory"),
        ("read behind", "an access outside shared memory: block (0, 0, 0), thread 5"),
        ("misaligned", "misaligned address: block (0, 0, 0), thread"),
        ("early access", "an access before wait_for_kernels_before(): block (0, 0, 0), thread"),
        ("no wait", "a thread without wait_for_kernels_before(): block (0, 0, 0), thread 7"),
    ],
)
def test_a_mistake_is_reported(library, fault, reason, backwards):
    assert reason in run_sum(library, fault, backwards)[0]
    assert run_sum(library, "none", backwards) == ("", True)  # and does no harm to the next launch


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", ["no barrier", "unwritten"])
def test_a_race_and_unwritten_memory_give_wrong_results(library, fault, backwards):
    assert run_sum(library, fault, backwards) == ("", False)


def test_what_several_want_at_once_is_compiled_once(tmp_path, monkeypatch):
    """As processes of one test run do; locks of files hold between threads as well."""
    source, compiler, calls = tmp_path / "one.cpp", tmp_path / "compiler", tmp_path / "calls"
    source.write_text('extern "C" int one() { return 1; }\n')
    compiler.write_text(f'#!/bin/sh\necho >> {calls}\nsleep 0.2\nexec {os.environ.get("CXX", "c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: build.link({source: None}), range(4)))
    assert [ctypes.CDLL(str(library)).one() for library in made] == [1]
    assert calls.read_text() == "\n\n"  # the object, the library
