# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that a model saves for the backward pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode


def check_image_shape(op: str, shape: Any) -> tuple[int, ...]:
    """The shape of one image as a tuple; raises ValueError for what is no such shape."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{op}: expected input_shape to be [channels, spatial] of one image, got {shape!r}")
    return sizes


def check_not_lazy(op: str, model: nn.Module) -> None:
    """Raises ValueError for a model of which nobody knows the sizes yet; errors begin with ``op``."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{op}: expected a model that has run once, as {name} belongs to a lazy module")


def saved_bytes_per_image(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes saved for backward that grow with the batch, in eval mode: nothing is dropped at random.

    Args:
        model: on the meta device. It runs as it would on the CPU, without numbers: the meta device forgets memory
            formats, and so does not see where a result is copied.
        shape: of one image, ``[channels, spatial]``.
    """
    kept = [_kept(model, (batch, *shape)) for batch in (2, 4)]
    return math.ceil((kept[1] - kept[0]) / 2)


def _kept(model: nn.Module, shape: tuple[int, ...]) -> int:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # too slow for every import of fastdense

    mode, cpu = FakeTensorMode(), torch.device("cpu")
    tensors = {name: FakeTensor(mode, t, cpu).requires_grad_(t.requires_grad) for name, t in _tensors(model)}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), cpu)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), mode, _NormsAtOnce():
        out = torch.func.functional_call(model.eval(), tensors, (x,))
    del out
    return sum(storage.nbytes() for storage in storages.values())


class _NormsAtOnce(TorchDispatchMode):
    """Batch norm of given statistics, by what a CPU returns: without numbers, torch takes many operators for it."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm.default and not args[5]:
            x: Tensor = args[0]
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        return func(*args, **(kwargs or {}))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
