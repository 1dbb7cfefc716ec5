# SPDX-License-Identifier: Apache-2.0
"""The process that runs one variant: ``python -m fastdense.bench.worker``.

Reads one job (a line of JSON) from standard input and answers ``{"event": "ready", ...}`` when
the model stands. Then each line ``{"command": "step"}`` runs one step and is answered by
``{"event": "step", "seconds": ..., "loss": ...}``; ``{"command": "finish"}`` is answered by
``{"event": "done", "peak_mib": ...}`` and ends the process. A failure is answered by
``{"event": "error", "reason": ...}`` and exit code 1. Standard output carries answers alone:
whatever else is printed goes to standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdense._support import InputError
from fastdense.bench.engines import engine
from fastdense.bench.job import Job
from fastdense.bench.memory import MIB, peak_resident_mib, resident_mib
from fastdense.bench.nets import VARIANTS, build
from fastdense.inference import freeze
from fastdense.memory.plan import plan_memory


class Steps:
    """A model with its batch, ready to run steps."""

    def __init__(self, job: Job) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self.job = job
        self.device = torch.device(job.device)
        self.variant = VARIANTS[job.variant]
        torch.manual_seed(job.seed)
        self.model: nn.Module = build(job.net, self.variant).to(self.device)
        self.model.train(job.mode == "train")
        self.digest = weights_digest(self.model)
        if job.fault == "loss":
            _shift_first_output(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=job.lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler(job.device, init_scale=1024.0, enabled=job.dtype == "float16")
        self.images, self.labels = self._load_batch()
        if self.variant.planned:
            self._plan()
        self.steps_done = 0
        self.forward = self._forward()
        self.step = self._train_step if job.mode == "train" else self._eval_step
        if self.variant.graph:
            self.step = self._capture(self.step)

    def _forward(self) -> Callable[[Tensor], Tensor]:
        """What computes the logits: the model, or what the variant makes of it."""
        if self.variant.engine is not None:
            return engine(self.variant.engine, self.model, self.images, torch.get_num_threads())
        if self.variant.frozen:
            freeze(self.model)
        return torch.compile(self.model, mode=self.variant.compile) if self.variant.compile else self.model

    def _plan(self) -> None:
        """Sets the memory modes that fit a step into the budget."""
        dtype = None if self.job.dtype == "float32" else getattr(torch, self.job.dtype)
        batch, *shape = self.images.shape
        try:
            plan = plan_memory(self.model, shape, batch_size=batch, budget=self.job.budget, dtype=dtype)
        except ValueError as error:
            raise InputError(f"bench: {error}") from error
        plan.apply()

    def _load_batch(self) -> tuple[Tensor, Tensor]:
        """The first `batch` images of the file, and labels that are arbitrary but fixed."""
        job = self.job
        stored = np.load(job.images, mmap_mode="r")
        images = torch.from_numpy(np.array(stored[: job.batch])).to(self.device)
        if self.variant.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(job.seed)
        labels = torch.randint(job.net.classes, (len(stored),), generator=generator)
        return images, labels[: job.batch].to(self.device)

    def run(self) -> dict[str, object]:
        """Runs and times one step.

        Returns:
            The step's loss, before the update, and its duration in seconds.
        """
        loss, seconds = self._time_cuda(self.step) if self.device.type == "cuda" else _time(self.step)
        self.steps_done += 1
        settled = self.steps_done == self.job.settle_steps and not self.variant.graph
        if settled and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"loss": float(loss), "seconds": seconds}

    def _loss(self) -> Tensor:
        """Forward pass and cross-entropy, under autocast for the 16-bit types."""
        dtype = getattr(torch, self.job.dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            logits = self.forward(self.images)
        return functional.cross_entropy(logits.float(), self.labels)

    def _train_step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    @torch.no_grad()
    def _eval_step(self) -> Tensor:
        return self._loss()

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Captures a step in a CUDA graph; what replays it starts from the model as it is now."""
        if self.device.type != "cuda" or self.scaler.is_enabled():
            raise InputError("bench: expected a variant with a CUDA graph to run on cuda in float32 or bfloat16")
        with restored(self.model, self.optimizer):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose algorithms, the optimizer makes its buffers
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.reset_peak_memory_stats()  # a replay allocates nothing: the capture's peak is the step's
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay

    def _time_cuda(self, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Times a step on the device's own clock."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        loss = step()
        end.record()
        torch.cuda.synchronize()
        return loss, start.elapsed_time(end) / 1e3

    def peak_mib(self) -> float:
        """Peak of the allocator (CUDA) or of the whole process's resident memory (CPU)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / MIB
        return peak_resident_mib()

    def held_mib(self) -> float:
        """Memory held now, with the model and the batch but before a step; as `peak_mib`."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() / MIB
        return resident_mib()


def _time(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    loss = step()
    return loss, time.perf_counter() - start


@contextlib.contextmanager
def restored(model: nn.Module, optimizer: torch.optim.SGD) -> Iterator[None]:
    """Undoes in place what steps inside do to parameters, buffers and momentum."""
    before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    yield
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])
        for state in optimizer.state.values():  # zeros are what a first step finds
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()


def weights_digest(model: nn.Module) -> str:
    """A hash of every parameter and buffer with its name; equal weights have equal digests."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shift_first_output(model: nn.Module) -> None:
    """The planted fault of the tests: a model that computes something else."""
    *_, bias = (value for name, value in model.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        bias[0] += 3.0


def serve(job: Job, commands: TextIO, answers: TextIO) -> None:
    """Builds the job's model and answers commands until the last one, or the end of input."""

    def answer(event: str, **values: object) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")
        answers.flush()

    steps = Steps(job)
    answer(
        "ready",
        digest=steps.digest,
        parameters=sum(p.numel() for p in steps.model.parameters()),
        held_mib=steps.held_mib(),
        threads=torch.get_num_threads(),
    )
    for line in commands:
        command = json.loads(line)["command"]
        if command == "finish":
            answer("done", peak_mib=steps.peak_mib())
            return
        if steps.steps_done:
            _misbehave(job.fault)
        answer("step", **steps.run())


def _misbehave(fault: str | None) -> None:
    """Fails in the way a test asked for."""
    if fault == "raise":
        raise RuntimeError("planted fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)


def main() -> int:
    """Entry point; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(Job.from_json(sys.stdin.readline()), sys.stdin, answers)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        answers.write(json.dumps({"event": "error", "reason": reason}) + "\n")
        answers.flush()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
