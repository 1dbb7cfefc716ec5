# SPDX-License-Identifier: Apache-2.0
"""The parent's end of a worker: start it, ask, and learn why it died."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from fastdense.bench.job import Job


class WorkerError(RuntimeError):
    """A worker failed; the message is the reason, on one line."""


class Worker:
    """A running worker process, started without waiting for it: see `wait_ready`.

    Args:
        job: what it shall run.
        timeout: seconds that one answer may take.
    """

    def __init__(self, job: Job, timeout: float = 900.0) -> None:
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastdense.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(job.threads),
            bufsize=0,
            process_group=0,  # Ctrl-C is for the parent, which ends its workers
        )
        self._send(job.to_json())

    def wait_ready(self) -> dict[str, Any]:
        """Waits for the model to be built.

        Returns:
            The worker's first answer: digest, parameters, held_mib, threads.

        Raises:
            WorkerError: the worker failed; so in every other method.
        """
        return self._answer()

    def step(self) -> dict[str, Any]:
        """Runs one step; returns its loss and its duration in seconds."""
        self._send('{"command": "step"}')
        return self._answer()

    def finish(self) -> float:
        """Ends the worker; returns its peak memory in MiB."""
        self._send('{"command": "finish"}')
        peak = float(self._answer()["peak_mib"])
        self.close()
        return peak

    def close(self) -> None:
        """Ends the process whatever it is doing; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        # A broken pipe means that the worker is gone; the answer will say why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._read_line())
        if answer["event"] == "error":
            raise WorkerError(" ".join(answer["reason"].split()))
        return answer

    def _read_line(self) -> bytes:
        """Reads up to a newline, within the timeout."""
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise WorkerError(f"no answer within {self._timeout:g} s")
            chunk = os.read(handle, 1 << 16)
            if not chunk:
                raise WorkerError(self._death())
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> str:
        """Why the process ended: its signal, or its exit code with the last line it printed."""
        code = self._process.wait()
        if code < 0:
            hint = " (often: the system ran out of memory)" if -code == signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {printed[-1].strip()}" if printed else "")


def _environment(threads: int) -> dict[str, str]:
    """This process's environment, with the thread count where the libraries look for it."""
    if not threads:
        return dict(os.environ)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
