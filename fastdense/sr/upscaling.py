# SPDX-License-Identifier: Apache-2.0
"""Runs super-resolution networks in bounded memory, with the same result as in one piece."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdense.models.sr.base import SuperResolutionNet, stripes

# Called with how many steps are done, and with their number.
Progress = Callable[[int, int], None]


# What a stripe may take where nothing is said: small enough to matter little, and its halo costs next to nothing.
_STRIPE_BYTES = 64 << 20


class Plan(NamedTuple):
    """How a picture is cut: rows of a stripe of the trunk, or None for all, and of the tail; bytes that this takes.

    Rows are counted in the trunk's features.
    """

    trunk_rows: int | None
    tail_rows: int
    bytes: int


def plan_upscale(net: SuperResolutionNet, height: int, width: int, itemsize: int, max_memory: int | None) -> Plan:
    """Chooses stripes so that all tensors except the weights take at most ``max_memory`` bytes, by estimate.

    Raises:
        ValueError: even stripes of one row take more; the message says how much.
    """
    rows, columns = -(-height // net.unshuffle), -(-width // net.unshuffle)
    pictures = (net.colours + net.out_colours * net.scale**2) * height * width * itemsize
    trunk_row, tail_row = (values * columns * itemsize for values in net.live_values())

    def tail(rows: int) -> int:
        return (rows + 2 * net.halo) * tail_row

    whole = pictures + rows * trunk_row
    unbounded = _STRIPE_BYTES if net.stripes_exactly else tail(rows)
    budget = unbounded if max_memory is None else max(max_memory - whole, 0)
    tail_rows = budget // tail_row - 2 * net.halo
    if tail_rows < rows:
        tail_rows = max(1, tail_rows - tail_rows % net.stripe_multiple)
    tail_rows = min(rows, tail_rows)
    if max_memory is None or whole + tail(tail_rows) <= max_memory:
        return Plan(None, tail_rows, whole + tail(tail_rows))

    def striped(rows: int) -> int:
        return pictures + (rows + 2 * (net.reach + net.halo)) * trunk_row + tail(1)

    trunk_rows = min(rows, 1 + max(0, max_memory - striped(1)) // trunk_row)
    if striped(trunk_rows) > max_memory:
        least = min(striped(1), whole + tail(1))
        raise ValueError(
            f"upscale: expected max_memory to be at least {least:,} bytes for a picture of {width} x {height}, "
            f"got {max_memory:,}"
        )
    return Plan(trunk_rows, 1, striped(trunk_rows))


def upscale(
    net: SuperResolutionNet,
    pictures: Tensor,
    *,
    max_memory: int | None = None,
    tail_rows: int | None = None,
    trunk_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Enlarges pictures in bounded memory. The result is that of ``net(pictures)``, except for rounding, and for
    networks of spandrel that do not run exactly in stripes (their ``notes`` say so).

    The trunk runs on the whole small picture. The tail, which would need most memory, runs in stripes of rows, each
    with the neighbouring rows that its convolutions see. If the trunk does not fit either, it runs in stripes too.
    Their halo covers its receptive field: this is exact, but only pays for high pictures.

    Args:
        net: any network of :mod:`fastdense.models` for super-resolution; its mode is not changed.
        pictures: ``[N, colours, H, W]``, in [0, 1], of the dtype of the weights.
        max_memory: bytes that all tensors but the weights may take, by estimate.
        tail_rows, trunk_rows: rows of stripes, instead of what :func:`plan_upscale` chooses; counted in the features.
        progress: called as ``progress(done, steps)`` after each block of the trunk and each stripe of the tail.

    Returns:
        ``[N, out_colours, scale * H, scale * W]``.

    Raises:
        TypeError: ``net`` is no network for super-resolution, or ``pictures`` no tensor.
        ValueError: shapes that do not fit; a ``max_memory`` that is too small.
    """
    if not hasattr(net, "colours"):
        raise TypeError(f"upscale: expected net to be a network for super-resolution, got {type(net).__name__}")
    if not isinstance(pictures, Tensor):
        raise TypeError(f"upscale: expected pictures to be a tensor, got {type(pictures).__name__}")
    if pictures.dim() != 4 or pictures.shape[1] != net.colours or 0 in pictures.shape:
        raise ValueError(
            f"upscale: expected pictures to have shape [N, {net.colours}, H, W] with positive sizes, "
            f"got {tuple(pictures.shape)}"
        )
    batch, _, height, width = pictures.shape
    limit = None if max_memory is None else max_memory // batch
    plan = plan_upscale(net, height, width, pictures.element_size(), limit)
    tail_rows, trunk_rows = tail_rows or plan.tail_rows, trunk_rows or plan.trunk_rows
    rows, scale = -(-height // net.unshuffle), net.tail_scale
    trunk_rows = trunk_rows or rows
    trunk = list(stripes(0, rows, trunk_rows, net.reach + net.halo, rows))
    steps = sum(len(net.parts()) + -(-(s.stop - s.start) // tail_rows) for s in trunk)
    with torch.no_grad(), _steps(net, steps, progress) as tick:
        out = pictures.new_empty(batch, net.out_colours, net.scale * height, net.scale * width)
        for s in trunk:
            part = pictures[:, :, s.low * net.unshuffle : s.high * net.unshuffle]
            features = net.trunk(_channels_last(part))
            low, high = max(s.low, s.start - net.halo), min(s.high, s.stop + net.halo)
            around = features[:, :, low - s.low : high - s.low]
            target = out[:, :, s.start * scale : s.stop * scale]
            _tail_in_stripes(net, around, tail_rows, s.start - low, target, tick)
    return out


@contextlib.contextmanager
def _steps(net: SuperResolutionNet, steps: int, progress: Progress | None) -> Iterator[Callable[[], None]]:
    """What reports one more step as done; parts of the trunk do so by themselves."""
    done = 0

    def tick(*_: Any) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    handles = [] if progress is None else [part.register_forward_hook(tick) for part in net.parts()]
    try:
        yield tick
    finally:
        for handle in handles:
            handle.remove()


def _channels_last(pictures: Tensor) -> Tensor:
    return pictures.contiguous(memory_format=torch.channels_last)


def _tail_in_stripes(
    net: SuperResolutionNet, features: Tensor, rows: int, first: int, out: Tensor, tick: Callable[[], None]
) -> None:
    """Fills ``out`` with the result that begins at row ``first`` of the features."""
    scale = net.tail_scale
    last = first + -(-out.shape[2] // scale)
    for s in stripes(first, last, rows, net.halo, features.shape[2]):
        made = net.tail(features[:, :, s.low : s.high])
        target = out[:, :, (s.start - first) * scale : (s.stop - first) * scale]
        begin = (s.start - s.low) * scale
        target.copy_(made[:, :, begin : begin + target.shape[2], : target.shape[3]])
        tick()
