# SPDX-License-Identifier: Apache-2.0
"""Python processes forked from one that has imported what takes seconds to import.

For tests that need a process, not a fresh start. Tests of what a start loads, or of ``python -m`` itself, use
:mod:`subprocess`.
"""

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

# SGD loads torch._dynamo at its first step.
PRELOADED = ["torch", "torch._dynamo", "fastdense.ops"]


def forking() -> Any:
    """A context of :mod:`multiprocessing` whose processes are forked from one that has imported ``PRELOADED``.

    No thread runs there, so that a fork is safe whatever this process does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _become(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str, own_group: bool, streams: list[Connection]
) -> None:
    """Runs what ``python *arguments`` would."""
    if own_group:
        os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    option, what, *rest = arguments
    if option == "-m":
        sys.argv[:] = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c", arguments
        sys.argv[:] = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Popen:
    """What tests need of :class:`subprocess.Popen`, for ``[sys.executable, "-m" or "-c", what, *arguments]``."""

    def __init__(
        self,
        command: Sequence[Any],
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: Any = None,
        process_group: int | None = None,
        bufsize: int = 0,
    ) -> None:
        assert command[0] == sys.executable and bufsize == 0 and process_group in (None, 0)
        ends = [_pipe(given, number) for number, given in enumerate((stdin, stdout, stderr))]
        self.stdin, self.stdout, self.stderr = (ours for ours, _ in ends)
        streams = [Connection(theirs) for _, theirs in ends]
        arguments = [os.fspath(argument) for argument in command[1:]]
        environment = dict(os.environ if env is None else env)
        folder = os.fspath(cwd or os.getcwd())
        self._process = forking().Process(
            target=_become, args=(arguments, environment, folder, process_group == 0, streams)
        )
        self._process.start()
        for stream in streams:
            stream.close()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _pipe(given: Any, number: int) -> tuple[io.FileIO | None, int]:
    """Our end, if there is one, and that of the process, of one of its standard streams."""
    if given == subprocess.PIPE:
        reads, writes = os.pipe()
        return (io.FileIO(writes, "w"), reads) if number == 0 else (io.FileIO(reads), writes)
    if given == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    return None, os.dup(number if given is None else given.fileno())
