# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling with the conventions of torch, Pillow, OpenCV and MATLAB as presets of one operator."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from fastdense._choices import Preset
from fastdense._extension import _C
from fastdense.ops.arguments import is_exporting
from fastdense.ops.autograd import register_autograd
from fastdense.ops.fakes import register_fake

BORDERS = ("clamp", "drop", "symmetric")
ROUNDINGS: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "round": lambda size: math.floor(size + 0.5),
    "even": round,  # halves to the even neighbour
    "ceil": math.ceil,
}
# No axis is longer: sizes are 32-bit numbers in the kernels.
_LONGEST = 2**31 - 1


class BicubicPreset(NamedTuple):
    """How a library resamples.

    ``a`` is the parameter of Keys's cubic; ``antialias`` widens it when shrinking; ``border`` says what stands for taps
    outside ("clamp": the edge sample, "drop": nothing, the rest is renormalised, "symmetric": the reflected image);
    ``rounding`` makes a size of a scale; ``bytes`` is how uint8 results are rounded: "last": once, halves to even;
    "matlab": after each axis, halves up; "pillow", "pillow12", "torch": after each axis in that library's fixed point
    and order of axes.
    """

    a: float
    antialias: bool
    border: str
    rounding: str
    bytes: str


PRESETS: dict[Preset, BicubicPreset] = {
    "torch": BicubicPreset(-0.75, False, "clamp", "floor", "torch"),
    "torch_antialias": BicubicPreset(-0.5, True, "drop", "floor", "torch"),
    "pillow": BicubicPreset(-0.5, True, "drop", "round", "pillow"),
    "pillow12": BicubicPreset(-0.5, True, "drop", "round", "pillow12"),
    "opencv": BicubicPreset(-0.75, False, "clamp", "even", "last"),
    "matlab": BicubicPreset(-0.5, True, "symmetric", "ceil", "matlab"),
}


_Options = tuple[list[float], float, bool, str, bool]


def _error(argument: str, expected: str, value: object) -> ValueError:
    return ValueError(f"bicubic_resize: expected {argument} to be {expected}, got {value!r}")


def _choose(argument: str, value: str | None, default: str, known: Sequence[str]) -> str:
    value = default if value is None else value
    if value not in known:
        raise _error(argument, f"one of {', '.join(known)}", value)
    return value


def _per_axis(argument: str, value: Any, dims: int) -> list[Any]:
    if not isinstance(value, int | float | torch.SymInt | Sequence) and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    values = [_number(v) for v in value] if isinstance(value, Sequence | torch.Size) else [_number(value)] * dims
    if len(values) != dims:
        raise _error(argument, f"one number or {dims}", value)
    return values


def _number(value: Any) -> Any:
    """A number of numpy, or a tensor without dimensions, as Python's."""
    if isinstance(value, int | float | torch.SymInt) or getattr(value, "ndim", None) != 0:
        return value
    return value.item()


def sizes_and_steps(
    old: Sequence[int], size: Any, scale_factor: Any, rounding: str, align_corners: bool
) -> tuple[list[int], list[float]]:
    """Size of the result of spatial sizes ``old``, and how many input samples an output sample is wide, by axis."""
    if (size is None) == (scale_factor is None):
        raise ValueError(
            f"bicubic_resize: expected either size or scale_factor to be given, got {size!r} and {scale_factor!r}"
        )
    if size is not None:
        sizes = _per_axis("size", size, len(old))
        for value in sizes:
            if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value <= 0:
                raise _error("size", "positive integers", size)
            if isinstance(value, int) and value > _LONGEST:
                raise _error("size", "below 2^31", size)
        steps = [n / m for n, m in zip(old, sizes, strict=True)]
    else:
        if len(old) == 1 and isinstance(_number(scale_factor), int | float):
            raise ValueError(
                f"bicubic_resize: expected an image to have shape [N, C, H, W] with scale_factor, got "
                f"three dimensions; write input[None] for one image, scale_factor=({scale_factor},) for signals"
            )
        scales = _per_axis("scale_factor", scale_factor, len(old))
        for n, value in zip(old, scales, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise _error("scale_factor", "finite and positive", scale_factor)
            if n * value > _LONGEST:
                raise _error("scale_factor", f"small enough for a result of less than 2^31 samples of {n}", value)
        sizes = [int(ROUNDINGS[rounding](n * scale)) for n, scale in zip(old, scales, strict=True)]
        if min(sizes) < 1:
            raise _error(
                "scale_factor", f"large enough for an output of at least 1 from an input of {old}", scale_factor
            )
        steps = [1.0 / scale for scale in scales]
    if align_corners:
        steps = [(n - 1) / (m - 1) if m > 1 else 0.0 for n, m in zip(old, sizes, strict=True)]
    return sizes, steps


def bicubic_resize(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    *,
    preset: Preset = "torch",
    a: float | None = None,
    antialias: bool | None = None,
    border: str | None = None,
    align_corners: bool = False,
    rounding: str | None = None,
    clamp: tuple[float, float] | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Resamples the spatial axes of a batch with Keys's cubic.

    Every axis is multiplied by a banded matrix. Output ``o`` lies at ``u = (o + 1/2) / s - 1/2`` on the input axis and
    weighs sample ``j`` by ``k h_a(k (u - j))`` with ``k = min(s, 1)`` when antialiasing, else 1, and
    ``h_a(x) = (a+2)|x|^3 - (a+3)|x|^2 + 1`` up to 1, ``a|x|^3 - 5a|x|^2 + 8a|x| - 4a`` up to 2, and 0 beyond.

    Args:
        input: ``[N, C, spatial]`` with one to three spatial axes; float64, float32, bfloat16, float16 (float32 sums) or
            uint8; any strides.
        size: of the result, one number or one per axis. ``s`` is then out / in.
        scale_factor: instead of ``size``; ``s`` is the given number, the size is ``s * in`` by ``rounding``. Signals
            ``[N, C, L]`` need a sequence of one number, so that an image without its batch is not taken for them.
        preset: whose convention to follow: "torch" (``F.interpolate``), "torch_antialias", "pillow" (13), "pillow12"
            (12 and before), "opencv", "matlab" (``imresize``). The arguments below override it.
        a: parameter of the cubic: -0.75 (torch, OpenCV) or -0.5 (the others).
        antialias: widen the cubic when shrinking.
        border: "clamp", "drop" or "symmetric", see :class:`BicubicPreset`.
        align_corners: map the corner samples onto each other, as ``F.interpolate`` does.
        rounding: "floor", "round" (halves up), "even" (halves to the even neighbour) or "ceil".
        clamp: lowest and highest value of the result.
        residual: added to the result before clamping; of its shape and dtype.
        out_dtype: of the result, floating point or uint8; that of the input by default.

    Returns:
        ``[N, C, size]``, contiguous, or channels_last for channels_last input. uint8 results are rounded and saturated
        as in the preset's library. They are bit-identical to Pillow's, MATLAB's and torch's, and to OpenCV's but for
        the rounding of its float32 sums. Those of floating-point input are rounded once, halves to even.

    Raises:
        ValueError: both or neither of size and scale_factor; numbers that are not positive and finite, or for which
            weights cannot be computed; unknown names; Pillow's or MATLAB's rounding of uint8 in three dimensions.
        TypeError: an input or ``out_dtype`` of another type than floating point and uint8.

    Note:
        Linear: gradients of any order and forward-mode derivatives use the transposed matrices. They need no atomics
        and are deterministic. The result of a plane is bit-identical for any batch, layout and number of threads.

    Reference:
        R. G. Keys. Cubic convolution interpolation for digital image processing. IEEE TASSP 29, 1981, equation 15.

    Example:
        >>> bicubic_resize(torch.ones(1, 3, 8, 8), scale_factor=2, preset="matlab").shape
        torch.Size([1, 3, 16, 16])
    """
    if not 3 <= input.dim() <= 5:
        raise _error("input", "of 3 to 5 dimensions [N, C, spatial]", tuple(input.shape))
    if input.dtype != torch.uint8 and not input.is_floating_point():
        raise TypeError(f"bicubic_resize: expected input to be floating point or uint8, got {input.dtype}")
    if out_dtype is not None and out_dtype != torch.uint8 and not out_dtype.is_floating_point:
        raise TypeError(f"bicubic_resize: expected out_dtype to be floating point or uint8, got {out_dtype}")
    if preset not in PRESETS:
        raise _error("preset", f"one of {', '.join(PRESETS)}", preset)
    known = PRESETS[preset]
    border = _choose("border", border, known.border, BORDERS)
    rounding = _choose("rounding", rounding, known.rounding, tuple(ROUNDINGS))
    a = known.a if a is None else float(a)
    antialias = known.antialias if antialias is None else bool(antialias)
    if not -math.inf < a < math.inf:
        raise _error("a", "finite", a)
    low, high = _limits(clamp)
    exports, dtype = is_exporting(), out_dtype or input.dtype
    is_torch = (a, antialias, border, rounding) == PRESETS["torch"][:4]
    if exports and input.dim() == 4 and is_torch and dtype != torch.uint8:
        # Unlike a constant matrix it takes inputs of changing size.
        enlarged = F.interpolate(_widened(input), size, scale_factor, "bicubic", align_corners)
        return _finished(enlarged, residual, low, high, dtype)
    sizes, steps = sizes_and_steps(list(input.shape[2:]), size, scale_factor, rounding, align_corners)
    if known.bytes == "torch" and (antialias or dtype == torch.uint8):
        # There torch leaves an axis alone whose size stays, whatever its scale factor is.
        steps = [1.0 if n == m else step for n, m, step in zip(input.shape[2:], sizes, steps, strict=True)]
    options = (steps, a, antialias, border, align_corners)
    if exports:
        is_bytes = input.dtype == dtype == torch.uint8
        product = _multiplied(_widened(input), sizes, options, known.bytes if is_bytes else "last")
        return _finished(product, residual, low, high, dtype)
    if input.dtype == torch.uint8 and out_dtype in (None, torch.uint8):
        if residual is not None or clamp is not None:
            raise _error("residual and clamp", "None for uint8 results", (residual is not None, clamp))
        return _bytes(input, sizes, options, known.bytes)
    if input.dtype == torch.uint8:
        assert out_dtype is not None
        input = input.to(out_dtype)
    return _finished(_resize(input, sizes, options, residual, low, high), None, -math.inf, math.inf, dtype)


def _limits(clamp: Any) -> tuple[float, float]:
    if clamp is None:
        return -math.inf, math.inf
    low, high = map(float, clamp) if hasattr(clamp, "__len__") and len(clamp) == 2 else (math.nan, math.nan)
    if not low <= high:
        raise _error("clamp", "a lowest and a highest value", clamp)
    return low, high


def _widened(input: Tensor) -> Tensor:
    return input.to(torch.float32) if input.dtype != torch.float64 else input


def axis_order(old: Sequence[int], sizes: list[int], steps: list[float], rounding: str) -> list[int]:
    """In which order a library takes them, for one that rounds in between; else where they shrink most first."""
    axes = list(range(len(sizes)))
    if rounding in ("last", "matlab"):
        return sorted(axes, key=lambda axis: -steps[axis])
    rows_first = rounding == "pillow" and len(axes) == 2 and _C.scalar.pillow_rows_first(*old, *sizes)
    return axes if rows_first else axes[::-1]


def _multiplied(x: Tensor, sizes: list[int], options: _Options, rounding: str) -> Tensor:
    """Torch's own operators, which every runtime knows: a dense matrix product an axis, perhaps rounded to bytes."""
    steps, a, antialias, border, corners = options
    for axis in axis_order(x.shape[2:], sizes, steps, rounding):
        rows = _C.bicubic_rows(x.shape[axis + 2], sizes[axis], steps[axis], a, antialias, border, corners)
        matrix = torch.tensor(rows, dtype=x.dtype, device=x.device)
        x = torch.matmul(x.movedim(axis + 2, -1), matrix.t()).movedim(-1, axis + 2)
        if rounding != "last":
            x = (x.clamp(0, 255) + 0.5).floor()
    return x


def _finished(out: Tensor, residual: Tensor | None, low: float, high: float, dtype: torch.dtype) -> Tensor:
    if residual is not None:
        out = out + residual
    if (low, high) != (-math.inf, math.inf):
        out = out.clamp(low, high)
    return out.clamp(0, 255).round().to(dtype) if dtype == torch.uint8 else out.to(dtype)


def _bytes(input: Tensor, sizes: list[int], options: _Options, rounding: str) -> Tensor:
    if input.dim() < 5:
        return torch.ops.fastdense.bicubic_uint8(input, sizes, *options, rounding)
    if rounding not in ("last", "torch"):
        raise _error("input", f"of at most 4 dimensions for uint8 rounded like {rounding}", tuple(input.shape))
    out = torch.ops.fastdense.bicubic(input.float(), sizes, *options, None, 0.0, 255.0)
    return (out + 0.5).to(torch.uint8)


def _resize(
    input: Tensor, sizes: list[int], options: _Options, residual: Tensor | None, low: float, high: float
) -> Tensor:
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(input)
        if tangent is not None:  # linear: the derivative of the result is the result of the derivative
            out = forward_ad.make_dual(
                _resize(primal, sizes, options, None, -math.inf, math.inf),
                _resize(tangent, sizes, options, None, -math.inf, math.inf),
            )
            out = out if residual is None else out + residual
            return out if low == -math.inf and high == math.inf else out.clamp(low, high)
    clamps = low != -math.inf or high != math.inf
    differentiates = torch.is_grad_enabled() and (
        input.requires_grad or (residual is not None and residual.requires_grad)
    )
    if clamps and differentiates:
        out = torch.ops.fastdense.bicubic(input, sizes, *options, residual, -math.inf, math.inf)
        return out.clamp(low, high)
    return torch.ops.fastdense.bicubic(input, sizes, *options, residual, low, high)


def _fake(input: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    sizes = [input.shape[0], input.shape[1], *size]
    channels_last = not input.is_contiguous() and input.movedim(1, -1).is_contiguous()
    if not channels_last:
        return input.new_empty(sizes)
    return input.new_empty([sizes[0], *sizes[2:], sizes[1]]).movedim(-1, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, _, *options, _, low, high = inputs
    if low != -math.inf or high != math.inf:
        raise ValueError(
            f"bicubic: expected low and high to be infinite where gradients are wanted, got {low} and {high}"
        )
    ctx.size, ctx.options = list(input.shape[2:]), options


def _backward(ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    needs_input, needs_residual = needs
    grad_input = torch.ops.fastdense._bicubic_backward(grad, ctx.size, *ctx.options) if needs_input else None
    return [grad_input, grad if needs_residual else None]


def _setup_double(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, _, *options = inputs
    ctx.size, ctx.options = list(grad_output.shape[2:]), options


def _double_backward(ctx: Any, needs: Sequence[bool], grad: Tensor) -> list[Tensor]:
    return [torch.ops.fastdense.bicubic(grad, ctx.size, *ctx.options, None, -math.inf, math.inf)]


register_autograd("bicubic", _backward, setup_context=_setup_context)
register_autograd("_bicubic_backward", _double_backward, setup_context=_setup_double)


def _fold(x: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
    """Moves a vmapped dimension into the batch."""
    if x is None:
        return None
    x = x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _vmap(op: Any, residual_at: int | None) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        batch = info.batch_size
        folded = list(args)
        for at in (0, residual_at):
            if at is not None:
                folded[at] = _fold(args[at], in_dims[at], batch)
        out = op(*folded)
        return out.unflatten(0, (batch, -1)), 0

    return rule


for _name, _residual_at in (("bicubic", 7), ("_bicubic_backward", None), ("bicubic_uint8", None)):
    register_fake(_name)(_fake)
    torch.library.register_vmap(f"fastdense::{_name}", _vmap(getattr(torch.ops.fastdense, _name), _residual_at))
