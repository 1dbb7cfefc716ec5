# SPDX-License-Identifier: Apache-2.0
"""The fused 1x1 kernels on the host: against float64, in every order of threads and copies, tests/mutants.py plants
mistakes that they must notice."""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.emulation.build import HERE, ROOT, load

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # of a rounding to storage
WIDTHS = (48, 96, 128, 160, 192)
NORM_EPS = 1e-3
UNTOUCHED = 77.0
SCHEDULES = [(backwards, early) for backwards in (False, True) for early in (False, True)]

SOURCES = [ROOT / "csrc/cuda/conv1x1/conv1x1_forward.cu", ROOT / "csrc/cuda/conv1x1/conv1x1_backward.cu"]
SOURCES += [ROOT / "csrc/cuda/norm_relu/norm_relu_backward.cu", HERE / "conv1x1_entry.cpp"]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = load(dict.fromkeys(SOURCES))
    for dtype in NAMES.values():
        getattr(library, f"forward_{dtype}").restype = getattr(library, f"backward_{dtype}").restype = ctypes.c_char_p
        getattr(library, f"statistics_{dtype}").restype = ctypes.c_char_p
        getattr(library, f"tile_{dtype}").restype = getattr(library, f"splits_{dtype}").restype = ctypes.c_int64
    library.sum_partials.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    width: int = 128
    rows: int = 70
    columns: int = 72
    ld: int = 96  # 96: rows of whole 16 bytes, 60: of 8, 54: of 4
    tile: int = 64  # of forward
    splits: int = 1  # of backward
    add: bool = True


def to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Problem:
    """Random numbers of a case; channels that nobody wrote yet, and padding, are NaN."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        m, c, b = case.rows, case.columns, case.width
        self.x = torch.full((m, case.ld), torch.nan, dtype=case.dtype)
        self.x[:, :c] = (normal(m, c) + 0.5).to(case.dtype)
        padded = -(-c // 8) * 8
        self.weight = torch.full((b, padded), torch.nan, dtype=case.dtype)
        self.weight[:, :c] = (normal(b, c) * (2 / c) ** 0.5).to(case.dtype)
        # weight, bias, mean, var
        self.norm = torch.stack([normal(c).abs() + 0.5, normal(c) * 0.3, normal(c) * 0.2, normal(c).abs() + 0.5])
        self.dz = normal(m, b).to(case.dtype)
        self.gradient = torch.full((m, case.ld), UNTOUCHED, dtype=case.dtype)
        self.gradient[:, :c] = normal(m, c).to(case.dtype) if case.add else torch.nan

    def operand(self, x: Tensor) -> Tensor:
        """As a product sees it, in float64."""
        return (to_tf32(x) if x.dtype == torch.float32 else x).double()

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """In float32, as the mask is decided; torch's own float32 square root is not always the nearest."""
        weight, bias, mean, var = self.norm
        scale = weight * (1 / (var + NORM_EPS).double().sqrt().float())
        return scale, bias - mean * scale

    def normed(self) -> Tensor:
        scale, shift = self.scale_and_shift()
        return self.x[:, : self.case.columns].float() * scale + shift

    def activated(self) -> Tensor:
        return self.normed().relu().to(self.case.dtype)


class Forward(NamedTuple):
    z: Tensor
    mean: Tensor  # of tiles
    m2: Tensor


def call(kernels: ctypes.CDLL, name: str, dtype: torch.dtype | None, *arguments: object) -> None:
    def convert(a: object) -> object:
        if isinstance(a, Tensor):
            return ctypes.c_void_p(a.data_ptr())
        if isinstance(a, bool):
            return ctypes.c_bool(a)
        return ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int64(a) if isinstance(a, int) else a

    function = getattr(kernels, name if dtype is None else f"{name}_{NAMES[dtype]}")
    assert function(*map(convert, arguments)).decode() == ""


def forward(kernels: ctypes.CDLL, p: Problem, schedule: tuple[bool, bool] = (False, False)) -> Forward:
    case = p.case
    kernels.set_schedule(*map(ctypes.c_bool, schedule))
    z = torch.full((case.rows + 1, case.width), UNTOUCHED, dtype=case.dtype)
    tiles = -(-case.rows // case.tile)
    partial = torch.full((tiles + 1, 2, case.width), UNTOUCHED)
    call(kernels, "forward", case.dtype, p.x, case.ld, p.weight, p.weight.shape[1], z, p.norm, NORM_EPS, partial,
         case.rows, case.columns, case.width, case.tile)  # fmt: skip
    assert (z[-1] == UNTOUCHED).all()
    assert (partial[-1] == UNTOUCHED).all()
    return Forward(z[:-1], partial[:-1, 0], partial[:-1, 1])


def check_forward(kernels: ctypes.CDLL, case: Case, schedule: tuple[bool, bool] = (False, False)) -> None:
    p = Problem(case)
    z, mean, m2 = forward(kernels, p, schedule)
    expected = p.operand(p.activated()) @ p.operand(p.weight[:, : case.columns]).T
    error = (z.double() - expected).abs()
    assert (error <= 1.01 * EPSILON[case.dtype] * expected.abs() + 4e-6).all()
    for i, rows in enumerate(z.double().split(case.tile)):
        assert torch.allclose(mean[i].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
        assert torch.allclose(m2[i].double(), (rows - rows.mean(0)).square().sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize(("width", "blocks"), [(48, 1), (128, 3), (160, 2), (192, 7)])
def test_the_last_block_makes_statistics(kernels, dtype, width, blocks, schedule):
    """Of the tiles that blocks take in turns, seven in all, the last one ragged."""
    case = Case(dtype, width, rows=6 * 32 + 5, columns=40, ld=48, tile=32)
    p = Problem(case)
    p.weight += 2  # means that are large against the deviation
    kernels.set_schedule(*map(ctypes.c_bool, schedule))
    z = torch.full((case.rows, width), UNTOUCHED, dtype=dtype)
    partial, statistics = torch.full((blocks, 2, width), torch.nan), torch.full((2, width), torch.nan)
    counts, ticket = torch.full((blocks,), -1), torch.zeros(1, dtype=torch.int32)
    call(kernels, "statistics", dtype, p.x, case.ld, p.weight, p.weight.shape[1], z, p.norm, NORM_EPS, partial, counts,
         ticket, statistics, case.rows, case.columns, width, case.tile, blocks)  # fmt: skip
    assert counts.sum() == case.rows
    assert ticket == 0
    mean, var = z.double().mean(0), z.double().var(0, correction=0)
    assert torch.allclose(statistics[0].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(statistics[1].double(), var, rtol=1e-5, atol=1e-6)


class Backward(NamedTuple):
    gradient: Tensor
    s1: Tensor
    s2: Tensor
    dweight: Tensor


def backward(kernels: ctypes.CDLL, p: Problem, schedule: tuple[bool, bool] = (False, False)) -> Backward:
    case = p.case
    kernels.set_schedule(*map(ctypes.c_bool, schedule))
    gradient = p.gradient.clone()
    partial = torch.full((case.splits, 2, case.columns), torch.nan)
    dweight = torch.full((case.splits, case.width, case.columns), torch.nan)
    call(kernels, "backward", case.dtype, p.dz, p.x, case.ld, p.weight, p.weight.shape[1], gradient, p.norm, NORM_EPS,
         partial, dweight, case.add, case.rows, case.columns, case.width, case.splits)  # fmt: skip
    assert (gradient[:, case.columns :] == UNTOUCHED).all()
    total = torch.full((case.width, case.columns), torch.nan)
    call(kernels, "sum_partials", None, dweight, case.splits, total.numel(), total)
    s1, s2 = partial.double().sum(0)
    return Backward(gradient[:, : case.columns], s1, s2, total)


def check_backward(kernels: ctypes.CDLL, case: Case, schedule: tuple[bool, bool] = (False, False)) -> None:
    p = Problem(case)
    actual = backward(kernels, p, schedule)
    scale, _ = p.scale_and_shift()
    dy = p.operand(p.dz) @ p.operand(p.weight[:, : case.columns])
    dym = torch.where(p.normed() <= 0, 0.0, dy)
    x = p.x[:, : case.columns].double()
    before = p.gradient[:, : case.columns].double() if case.add else 0
    gradient = before + scale.double() * dym
    error = (actual.gradient.double() - gradient).abs()
    assert (error <= 1.01 * EPSILON[case.dtype] * gradient.abs() + 1e-5).all()
    expected = {
        "s1": dym.sum(0),
        "s2": (dym * (x - p.norm[2].double())).sum(0),
        "dweight": p.operand(p.dz).T @ p.operand(p.activated()),
    }
    for name, value in expected.items():
        assert (getattr(actual, name).double() - value).norm() < 2e-6 * value.norm(), name


ODD = [
    Case(rows=300, columns=72, tile=128, splits=2),  # ragged, several tiles a split
    Case(rows=70, columns=330, ld=336, tile=32, splits=5),  # more steps than stages, splits without a tile
    Case(width=48, rows=70, columns=36, ld=60, tile=128, splits=2),  # rows of whole 8 bytes
    Case(torch.float16, 96, 49, 50, 54, tile=32, splits=3),  # and of 4
    Case(torch.float32, 48, 70, 75, 77, tile=64, splits=2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_emulated_kernels_in_every_schedule(kernels, case, schedule):
    check_forward(kernels, case, schedule)
    check_backward(kernels, case, schedule)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_emulated_kernel(kernels, dtype, width):
    for tile in (32, 64) if dtype == torch.float32 and width > 128 else (32, 64, 128):
        check_forward(kernels, Case(dtype, width, tile + 6, 56, 64, tile))
    check_backward(kernels, Case(dtype, width, 70, 56, 64, splits=1))
    check_backward(kernels, Case(dtype, width, 70, 56, 64, splits=2, add=False))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_emulated_kernels_hand_nan_through(kernels, dtype):
    p = Problem(Case(dtype, 48, 70, 40, 48))
    p.x[5, 3] = torch.nan
    p.dz[7, 2] = torch.nan
    z = forward(kernels, p).z
    assert z[5].isnan().all()
    assert z.isfinite().sum() == 69 * 48
    gradient, s1, s2, dweight = backward(kernels, p)
    assert gradient[7].isnan().any()
    assert gradient[torch.arange(70) != 7].isfinite().all()
    passed = gradient[7].isnan()
    assert torch.equal(s1.isnan(), passed)
    passed[3] = True
    assert torch.equal(s2.isnan(), passed)
    assert dweight[:, 3].isnan().all()
    assert dweight[2].isnan().all()
    assert dweight.isfinite().sum() == 47 * 39


def test_emulated_products_without_the_weights_gradient(kernels):
    p = Problem(Case(splits=2))
    case, gradient, partial = p.case, p.gradient.clone(), torch.full((2, 2, p.case.columns), torch.nan)
    call(kernels, "backward", case.dtype, p.dz, p.x, case.ld, p.weight, p.weight.shape[1], gradient, p.norm, NORM_EPS,
         partial, ctypes.c_void_p(), True, case.rows, case.columns, case.width, case.splits)  # fmt: skip
    expected = backward(kernels, p)
    assert torch.equal(gradient[:, : case.columns], expected.gradient)
    assert torch.equal(partial.double().sum(0)[1], expected.s2)


def test_tiles_fill_the_device(kernels):
    """On 132 multiprocessors."""

    def tile(rows: int, width: int, dtype: str = "bfloat16") -> int:
        return getattr(kernels, f"tile_{dtype}")(*map(ctypes.c_int64, (rows, width, 132)))

    assert [tile(64 * side**2, 128) for side in (56, 28, 14, 7)] == [128, 128, 64, 32]
    assert tile(64 * 56**2, 192, "float32") == 64

    def splits(rows: int, columns: int, dtype: str = "bfloat16") -> int:
        return getattr(kernels, f"splits_{dtype}")(*map(ctypes.c_int64, (rows, columns, 132)))

    assert splits(64 * 56**2, 64) == 264
    assert splits(64 * 56**2, 65) == 132
    assert splits(64 * 7**2, 512) == 12  # of 256 rows and more
    assert splits(100, 4096) == 1
    assert splits(64 * 56**2, 64, "float32") == 132
