# SPDX-License-Identifier: Apache-2.0
"""The training step that is planned: images, loss, autocast, and what is in memory before it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from fastdense.fusion.saved_memory import check_image_shape, check_not_lazy

Loss = Callable[[Any], Tensor]
# Larger batches are not run, but follow from these two.
BATCHES = (2, 8)


class StepOptions(TypedDict, total=False):
    """What else there is to say of a training step.

    Args:
        optimizer_state: numbers that the optimizer keeps for each parameter: 1 (default) for SGD with momentum, 2 for
            Adam.
        loss: the loss of the model's output; by default the mean of all of its numbers.
        device: where to run; by default the parameters' device.
        dtype: of autocast; None (default) for none.
        exact: whether to choose among the modes that give the same bits (default); False adds "reversible", of dual
            path blocks.
        measure: whether times are measured (default). False counts operations, at 100 GFLOP/s: the same on every
            machine and at every time. Such times can be compared with each other, not with a clock.
    """

    optimizer_state: float
    loss: Loss | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    exact: bool
    measure: bool


class StepSetting(NamedTuple):
    """Everything of a step but the model's modes; see :class:`StepOptions`."""

    shape: tuple[int, ...]
    device: torch.device
    input_dtype: torch.dtype
    loss: Loss
    dtype: torch.dtype | None
    measure: bool
    weight_bytes: int

    @classmethod
    def of(cls, op: str, model: nn.Module, input_shape: Sequence[int], options: StepOptions) -> "StepSetting":
        """Checks what was asked for; errors begin with ``op``."""
        shape, optimizer_state = check_image_shape(op, input_shape), options.get("optimizer_state", 1.0)
        if not isinstance(optimizer_state, int | float) or not 0 <= optimizer_state < float("inf"):
            raise ValueError(f"{op}: expected optimizer_state to be a number of at least 0, got {optimizer_state!r}")
        if options.get("loss") is not None and not callable(options["loss"]):
            raise TypeError(f"{op}: expected loss to be a function of the model's output, got {options['loss']!r}")
        check_not_lazy(op, model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{op}: expected model to have parameters that require grad, got none")
        unknown = options.keys() - StepOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"{op}: expected options out of {', '.join(StepOptions.__annotations__)}, got {unknown}")
        parameters, buffers = list(model.parameters()), list(model.buffers())
        given = options.get("device")
        weight_bytes = sum(t.nbytes for t in (*parameters, *buffers))
        weight_bytes += int(optimizer_state * sum(p.nbytes for p in parameters if p.requires_grad))
        return cls(
            shape,
            next(iter(parameters), torch.empty(0)).device if given is None else torch.device(given),
            next((p.dtype for p in parameters if p.is_floating_point()), torch.float32),
            options.get("loss") or _mean_of_all,
            options.get("dtype"),
            options.get("measure", True),
            weight_bytes,
        )

    def fixed_bytes(self, batch: int) -> int:
        """In use before a step."""
        images = batch * self.input_dtype.itemsize
        for size in self.shape:
            images *= size
        return self.weight_bytes + images

    @contextlib.contextmanager
    def running(self, batch: int) -> Iterator[Tensor]:
        """Random images, in a context where steps run; random generators are put back behind it."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            x = torch.randn(batch, *self.shape, dtype=self.input_dtype, device=self.device)
            with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                yield x


def _mean_of_all(output: Any) -> Tensor:
    """The mean of all numbers in an output: a tensor, or tensors in tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return output.float().mean() if output.dtype != torch.float64 else output.mean()
    parts = output.values() if isinstance(output, dict) else output
    return torch.stack([_mean_of_all(part) for part in parts]).sum()
