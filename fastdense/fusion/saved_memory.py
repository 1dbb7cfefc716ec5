# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that a model saves for the backward pass."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), mode:
        out = torch.func.functional_call(model.eval(), tensors, (x,))
    del out
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
