# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of resampling, run on the host: bit-equal to the CPU kernels, which follow the reference."""

import ctypes
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdense import _C, bicubic_resize
from fastdense.ops.bicubic import PRESETS
from tests.cases.bicubic import random
from tests.cases.simd import simd_level
from tests.emulation.build import build

FLOATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIZES = [((9, 11), (20, 25)), ((5, 7), (5, 40)), ((33, 3), (70, 13)), ((1, 6), (3, 1)), ((40, 12), (90, 31))]
POISON = 77


class Band(ctypes.Structure):
    """``BicubicBand``, and the tensors that keep its memory alive."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "columns", "taps")] + [
        (name, ctypes.c_void_p) for name in ("start", "weight")
    ]

    def __init__(self, n: int, m: int, preset: str, dtype: torch.dtype, transposed: bool = False) -> None:
        known = PRESETS[preset]
        matrix = torch.tensor(
            _C.bicubic_rows(n, m, n / m, known.a, known.antialias, known.border, False), dtype=torch.float64
        )
        matrix = matrix.t() if transposed else matrix
        first = (matrix != 0).int().argmax(1)
        last = matrix.shape[1] - 1 - (matrix != 0).flip(1).int().argmax(1)
        first = first.flip(0).cummin(0).values.flip(0)  # starts never fall
        taps = int((last - first).max()) + 1
        start = first.clamp(max=matrix.shape[1] - taps)
        weight = matrix.gather(1, start[:, None] + torch.arange(taps))
        if dtype == torch.int32 and preset == "torch":  # integers of 16 bits times a power of two
            unit = 2.0 ** (15 - torch.frexp(weight.max() * (1 + 0.5 / 2**15)).exponent)
            weight = torch.trunc(weight * unit + 0.5 * weight.sign()) / unit
        if dtype == torch.int32:
            weight = torch.trunc(weight * 2**22 + 0.5 * weight.sign())
        self.tensors = start.int().contiguous(), weight.to(dtype).contiguous()
        super().__init__(*matrix.shape, taps, *(t.data_ptr() for t in self.tensors))


@pytest.fixture(scope="module")
def kernels():
    return build("bicubic")


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


def numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def limits(low: float = -math.inf, high: float = math.inf) -> list[ctypes.c_double]:
    return [ctypes.c_double(low), ctypes.c_double(high)]


def run_image(kernels, x: Tensor, size, preset: str, residual: Tensor | None = None, **clamp) -> Tensor:
    """x [planes, H, W, inner]"""
    planes, height, width, inner = x.shape
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, columns = Band(height, size[0], preset, accumulate), Band(width, size[1], preset, accumulate)
    out = torch.full((planes, *size, inner), POISON, dtype=x.dtype)
    launch = getattr(kernels, f"image_{FLOATS[x.dtype]}")
    arguments = pointer(x), pointer(out), pointer(residual), *numbers(planes, inner)
    assert launch(*arguments, ctypes.byref(rows), ctypes.byref(columns), *limits(**clamp)) == 0
    return out


def run_axis(kernels, x: Tensor, m: int, preset: str, transposed_from: int | None = None) -> Tensor:
    """x [planes, n, inner]"""
    planes, n, inner = x.shape
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    band = Band(transposed_from or n, n if transposed_from else m, preset, accumulate, transposed_from is not None)
    out = torch.full((planes, m, inner), POISON, dtype=x.dtype)
    launch = getattr(kernels, f"axis_{FLOATS[x.dtype]}")
    assert launch(pointer(x), pointer(out), pointer(None), *numbers(planes, inner), ctypes.byref(band), *limits()) == 0
    return out


def channels_inside(x: Tensor, inner: int) -> Tensor:
    """[N, C, H, W] as the kernels see it: planes of 1, or pixels of C."""
    return (x.movedim(1, -1) if inner > 1 else x.flatten(0, 1)[..., None]).contiguous()


def check_image(kernels) -> None:
    for (old, new), channels, dtype in itertools.product(SIZES, (1, 3), FLOATS):
        x = random(2, channels, *old, dtype=dtype)
        layout = torch.channels_last if channels > 1 else torch.contiguous_format
        with simd_level("baseline"):
            wanted = bicubic_resize(x.to(memory_format=layout), new, preset="torch")
        made = run_image(kernels, channels_inside(x, channels), new, "torch")
        error = (made - channels_inside(wanted, channels)).abs().max()
        bound = 0 if dtype in (torch.bfloat16, torch.float16) else 4 * torch.finfo(dtype).eps * 10
        # A two-byte result may round to the neighbour where the order of the axes differs.
        assert error <= (bound or torch.finfo(dtype).eps * 4 * max(1, wanted.abs().max().item())), (old, new, dtype)


def check_axis(kernels) -> None:
    for (n, m), preset, inner, dtype in itertools.product(
        [(9, 20), (40, 7), (16, 16), (5, 1)], ("torch", "matlab"), (1, 3, 40), (torch.float32, torch.float64)
    ):
        x = random(3, inner, n, dtype=dtype)
        wanted = bicubic_resize(x, m, preset=preset).movedim(1, 2)
        made = run_axis(kernels, x.movedim(1, 2).contiguous(), m, preset)
        torch.testing.assert_close(made, wanted, msg=f"{n} to {m}, {preset}, {inner} channels, {dtype}")


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_image_kernel(kernels, backwards):
    kernels.set_backwards(backwards)
    before = kernels.launches()
    check_image(kernels)
    assert kernels.launches() > before


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_axis_kernel(kernels, backwards):
    kernels.set_backwards(backwards)
    check_axis(kernels)


def test_the_orders_of_threads_give_the_same_bits(kernels):
    x = random(2, 33, 21, 3, dtype=torch.float32)
    results = []
    for backwards in (False, True):
        kernels.set_backwards(backwards)
        results.append(run_image(kernels, x, (70, 50), "matlab"))
    assert torch.equal(*results)


def test_transposed_axis_is_the_gradient(kernels):
    x, grad = random(2, 3, 9).requires_grad_(), random(2, 3, 20)
    (wanted,) = torch.autograd.grad(bicubic_resize(x, 20, preset="matlab"), x, grad)
    made = run_axis(kernels, grad.movedim(1, 2).contiguous(), 9, "matlab", transposed_from=9)
    torch.testing.assert_close(made.movedim(2, 1), wanted)


def test_residual_and_clamp(kernels):
    x, residual = random(2, 6, 7, 1), random(2, 12, 14, 1)
    made = run_image(kernels, x, (12, 14), "torch", residual, low=-0.5, high=0.5)
    wanted = bicubic_resize(x.movedim(-1, 1), (12, 14), residual=residual.movedim(-1, 1), clamp=(-0.5, 0.5))
    torch.testing.assert_close(made, wanted.movedim(1, -1))


def test_nan_stays_nan(kernels):
    x = random(1, 6, 7, 1)
    x[0, 2, 3, 0] = math.nan
    made = run_image(kernels, x, (12, 14), "torch", low=-0.5, high=0.5)
    assert torch.equal(made.isnan().movedim(-1, 1), bicubic_resize(x.movedim(-1, 1), (12, 14)).isnan())


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("opencv", torch.float32),
        ("matlab", torch.float64),
        ("pillow", torch.int32),
        ("pillow12", torch.int32),
        ("torch", torch.int32),
    ],
)
@pytest.mark.parametrize("size", [(30, 25), (5, 6), (30, 4), (3, 11)])
def test_bytes(kernels, preset, dtype, size):
    x = torch.randint(0, 256, (2, 3, 13, 12), dtype=torch.uint8)
    wanted = bicubic_resize(x, size, preset=preset)
    rows, columns = Band(13, size[0], preset, dtype), Band(12, size[1], preset, dtype)
    columns_first = {"matlab": 12 / size[1] > 13 / size[0], "pillow": size != (3, 11)}.get(preset, True)
    between = torch.empty(6 * max(13, size[0]) * max(12, size[1]), dtype=dtype)
    out = torch.full((6, *size, 1), POISON, dtype=torch.uint8)
    launch = getattr(kernels, "bytes_" + {torch.float32: "last", torch.float64: "matlab", torch.int32: "pillow"}[dtype])
    arguments = pointer(channels_inside(x, 1)), pointer(between), pointer(out), *numbers(6, 1)
    order = ctypes.c_bool(columns_first), ctypes.c_bool(preset != "opencv")
    assert launch(*arguments, ctypes.byref(rows), ctypes.byref(columns), *order) == 0
    difference = (out.flatten().int() - channels_inside(wanted, 1).flatten().int()).abs()
    # float32 sums in another order may fall on the other side of a half.
    assert difference.max() <= (1 if preset == "opencv" else 0)
    assert (difference > 0).sum() <= 3


@pytest.mark.parametrize(
    "plant",
    [
        ("k + 1 < kTaps; ++k) rolling[k] = rolling[k + 1]", "k + 2 < kTaps; ++k) rolling[k] = rolling[k + 1]"),
        ("next = next < first ? first : next; next < first + kTaps", "next = first; next < first + kTaps - 1"),
        ("if (element >= out_width) return;", "if (element + 1 >= out_width) return;"),
        ("p.columns.start[column] * p.inner + element % p.inner", "p.columns.start[column] * p.inner"),
        ("p.rows.rows ? begin + kStrip : p.rows.rows", "p.rows.rows ? begin + kStrip - 1 : p.rows.rows"),
        ("(plane) * p.band.columns + p.band.start[row]", "(plane) * p.band.rows + p.band.start[row]"),
        ("in[k * p.inner]", "in[k]"),
    ],
)  # fmt: skip
def test_planted_mistakes_are_noticed(plant):
    broken = build("bicubic", plant)
    with pytest.raises(AssertionError):
        check_image(broken)
        check_axis(broken)


def test_image_with_more_rows_than_a_grid_has_blocks(kernels):
    """A block makes 32 of them; the last rows read the second row of the input, all others the first."""
    last = 50
    rows = 65535 * 32 + last

    def band(start: Tensor, columns: int) -> Band:
        made, weight = Band.__new__(Band), torch.ones(len(start))
        made.tensors = start, weight
        ctypes.Structure.__init__(made, len(start), columns, 1, start.data_ptr(), weight.data_ptr())
        return made

    x = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    out = torch.full((rows, 2), float(POISON))
    high = band((torch.arange(rows) >= rows - last).int(), 2)
    wide = band(torch.arange(2).int(), 2)
    arguments = pointer(x), pointer(out), pointer(None), *numbers(1, 1), ctypes.byref(high), ctypes.byref(wide)
    assert kernels.image_float32(*arguments, *limits()) == 0
    assert (out[:-last] == x[0]).all()
    assert (out[-last:] == x[1]).all()
