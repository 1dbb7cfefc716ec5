# SPDX-License-Identifier: Apache-2.0
"""Two processes that stay for many tests and run functions together, as a group of torch.distributed."""

import datetime
import os
import random
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.cases.forks import forking

WORLD = 2
SECONDS = 120  # after which a process that waits for another gives up


def _serve(rank: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    while (task := connection.recv()) is not None:
        function, arguments = task
        random.seed(0)
        torch.manual_seed(0)
        try:
            connection.send((None, function(rank, *arguments)))
        except BaseException:
            connection.send((traceback.format_exc(), None))
            os._exit(1)  # the other process may wait for ever
    dist.destroy_process_group()


class Processes:
    """Calls ``function(rank, *arguments)`` of a module in all processes; started at the first call."""

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.connections: list[Any] = []
        self.folder = tempfile.TemporaryDirectory()

    def start(self) -> None:
        context = forking()
        store = tempfile.mktemp(dir=self.folder.name)
        for rank in range(WORLD):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            worker.start()
            there.close()
            self.workers.append(worker)
            self.connections.append(here)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        for connection in self.connections:
            connection.close()
        self.workers, self.connections = [], []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of all processes; fails with the traceback of the first that raises."""
        if not self.workers:
            self.start()
        for connection in self.connections:
            connection.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < WORLD:
            waiting = [c for rank, c in enumerate(self.connections) if rank not in results]
            ready = wait(waiting, SECONDS)
            try:
                for connection in ready:
                    error, result = connection.recv()
                    assert error is None, error
                    results[self.connections.index(connection)] = result
                assert ready, f"no answer in {SECONDS} seconds"
            except (AssertionError, EOFError) as problem:
                self.stop()
                pytest.fail(str(problem) or "a process is gone")
        return [results[rank] for rank in range(WORLD)]


def part_of(rank: int, split: tuple[int, ...]) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))
