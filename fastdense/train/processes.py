# SPDX-License-Identifier: Apache-2.0
"""One training run in several processes, as ``torchrun`` starts them; one process is the ordinary case."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdense._support import InputError
from fastdense.models.fractalnet import FractalNet
from fastdense.nn import StochasticDepth


class Processes:
    """This process's place among those of a run.

    Attributes:
        rank: number of this process; 0 writes files and shows progress.
        world: number of processes.
        device: where this process computes: with several, ``cuda`` is the GPU of its local rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.device = device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, where: slice) -> slice:
        """This process's part of a batch; parts differ by one image at most."""
        count = where.stop - where.start
        first, last = (where.start + count * (self.rank + more) // self.world for more in (0, 1))
        return slice(first, last)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes.

        Raises:
            InputError: with several processes, a model that leaves layers out at random: each would draw others.
        """
        if self.world == 1:
            return model
        for module in model.modules():
            by_depth = isinstance(module, StochasticDepth) and module.survival < 1 and module.mode == "batch"
            by_path = isinstance(module, FractalNet) and (module.drop_path > 0 or module.global_ratio > 0)
            if by_depth or by_path:
                raise InputError(
                    f"train: {type(model).__name__} drops layers at random, which {self.world} processes do not "
                    "support; train it in one process, or without stochastic depth and drop-path"
                )
        return DistributedDataParallel(model)

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def same_buffers(self, model: nn.Module) -> None:
        """Gives all processes the running statistics of the first."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def started(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` started, if it did; a group that exists already is taken as it is.

    Raises:
        InputError: there is no GPU for this process.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1 and device.type == "cuda":
        local = int(environment.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"train: expected a GPU for every process, got {torch.cuda.device_count()} GPUs and local rank {local}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    starts = int(environment.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if starts:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device)
    finally:
        if starts:
            dist.destroy_process_group()
