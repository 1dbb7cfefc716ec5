# SPDX-License-Identifier: Apache-2.0
"""Two runs never write to one folder."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastdense._support import InputError
from fastdense.cli import main
from fastdense.train.lock import locked
from tests.cases import forks


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    with locked(tmp_path):
        (tmp_path / "file").touch()
        refusal = re.escape(f"got {tmp_path}, where process {os.getpid()} on ") + ".* is training; wait for it"
        with pytest.raises(InputError, match=refusal), locked(tmp_path):
            pass
        with locked(tmp_path / "another"):
            pass
    with locked(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["another", "file"]


@pytest.mark.parametrize("task", ["classify", "sr"])
def test_the_second_command_says_why(task, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"of the first")
    with locked(tmp_path):
        assert main(["train", "--task", task, "--fresh", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdense: train: expected out to be a folder that no other run writes to")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"of the first"


def test_many_runs_that_begin_at_once_come_one_at_a_time(tmp_path):
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most, done
        for _ in range(50):
            try:
                with locked(tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.0005)
                    with guard:
                        inside -= 1
                        done += 1
            except InputError:
                time.sleep(0.0002)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for entered in [threads.submit(enter) for _ in range(4)]:
            entered.result()
    assert most == 1 and done > 0 and os.listdir(tmp_path) == []


# Takes the lock, forks a worker that outlives it, and waits to be killed.
OWNER = """
import os, sys, time
from pathlib import Path
from fastdense.train.lock import locked
from tests.cases import forks
with locked(Path(sys.argv[1])):
    Path(sys.argv[1], ".half.fastdense-tmp").touch()
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


def test_a_killed_run_frees_its_folder_although_its_workers_live(tmp_path):
    root = str(Path(__file__).parents[1])
    owner = forks.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root, process_group=0)
    worker = int(owner.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"process {owner.pid} on"), locked(tmp_path):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        os.kill(worker, 0)  # lives
        with locked(tmp_path):
            assert os.listdir(tmp_path) == [".lock"]
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out"), locked(tmp_path / "file" / "out"):
        pass
    (tmp_path / ".lock").symlink_to("file")
    with pytest.raises(InputError, match="expected out to be a folder that can be written"), locked(tmp_path):
        pass
