# SPDX-License-Identifier: Apache-2.0
"""The fused 3x3 kernels on the host: against float64, in every order of threads and copies. tests/mutants.py plants
mistakes that they must notice."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdense.ops import dropout_mask
from tests.emulation.build import HERE, ROOT, load
from tests.emulation.conv_tiles import conv_tile

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-11}  # of storage, or of TF32's factors
NORM_EPS = 1e-3
UNTOUCHED = 77.0
SCHEDULES = [(backwards, early) for backwards in (False, True) for early in (False, True)]
LARGE, SMALL = 227 << 10, 99 << 10  # shared memory of a block: compute capability 9.0 and 8.6

STEMS = ("forward", "input_gradient", "weight_gradient")
SOURCES = [ROOT / f"csrc/dense_block/dense_block_conv_{stem}_kernels.cu" for stem in STEMS]
SOURCES += [ROOT / "csrc/cuda/norm_relu/norm_relu_backward.cu", HERE / "dense_block_conv_entry.cpp"]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = load(dict.fromkeys(SOURCES))
    for dtype in NAMES.values():
        for stem in STEMS:
            getattr(library, f"{stem}_{dtype}").restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Case:
    batch: int = 2
    height: int = 7
    width: int = 7
    b: int = 48
    k: int = 12
    dtype: torch.dtype = torch.bfloat16
    processors: int = 1
    shared: int = LARGE
    first: int = 12  # channel of the slice in its buffer, and what follows it: 12 of 2 bytes leave rows of 8
    behind: int = 8
    rate: float = 0.0


class Problem:
    """Random numbers of a case, and what the kernels make of them."""

    def __init__(self, case: Case) -> None:
        self.case = c = case
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.pixels = c.batch * c.height * c.width
        self.z = (normal(self.pixels, c.b) + 0.3).to(c.dtype)
        self.d = normal(self.pixels, c.k).to(c.dtype)
        self.weight = (normal(c.k, 9, c.b) * (2 / 9 / c.b) ** 0.5).to(c.dtype)
        chunk = 16 // c.dtype.itemsize
        self.exchanged = torch.full((c.b, 9, -(-c.k // chunk) * chunk), torch.nan, dtype=c.dtype)
        self.exchanged[:, :, : c.k] = self.weight.permute(2, 1, 0)
        # weight, bias, mean, var
        b = c.b
        self.norm = torch.stack([normal(b).abs() + 0.5, normal(b) * 0.3 + 0.2, normal(b) * 0.2, normal(b).abs() + 0.5])
        self.seed = torch.tensor(1234)

    def _call(self, library: ctypes.CDLL, stem: str, *arguments: object) -> None:
        c = self.case
        shape = (ctypes.c_int64 * 5)(c.batch, c.height, c.width, c.b, c.k)
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        function = getattr(library, f"{stem}_{NAMES[c.dtype]}")
        said = function(shape, ctypes.c_int64(c.processors), ctypes.c_int64(c.shared), *converted).decode()
        if said:
            raise RuntimeError(said)

    def forward(self, library: ctypes.CDLL) -> tuple[Tensor, Tensor, Tensor]:
        """The slice, its mean and variance."""
        c = self.case
        ld = c.first + c.k + c.behind
        buffer = torch.full((self.pixels, ld), UNTOUCHED, dtype=c.dtype)
        mean, var = torch.full((2, c.k), torch.nan)
        self._call(
            library, "forward", self.z, self.norm, self.weight, buffer[:, c.first :], ctypes.c_int64(ld),
            self.seed if c.rate > 0 else None, ctypes.c_double(c.rate), mean, var,
        )  # fmt: skip
        slice_ = buffer[:, c.first : c.first + c.k].clone()
        buffer[:, c.first : c.first + c.k] = UNTOUCHED
        assert (buffer == UNTOUCHED).all()
        return slice_, mean, var

    def input_gradient(self, library: ctypes.CDLL) -> tuple[Tensor, Tensor, Tensor]:
        """dv and the gradients of the norm's parameters."""
        c = self.case
        dv = torch.full((self.pixels + 1, c.b), UNTOUCHED, dtype=c.dtype)
        dweight, dbias = torch.full((2, c.b), torch.nan)
        self._call(
            library, "input_gradient", self.d, self.exchanged, ctypes.c_int64(self.exchanged.shape[2]), self.z,
            self.norm, dv, dweight, dbias,
        )  # fmt: skip
        assert (dv[-1] == UNTOUCHED).all()
        return dv[:-1], dweight, dbias

    def weight_gradient(self, library: ctypes.CDLL) -> Tensor:
        c = self.case
        dweight = torch.full((c.k, 9, c.b), torch.nan)
        self._call(library, "weight_gradient", self.d, self.z, self.norm, dweight)
        return dweight

    def image(self, rows: Tensor) -> Tensor:
        return rows.double().view(self.case.batch, self.case.height, self.case.width, -1).permute(0, 3, 1, 2)

    def rows(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1).reshape(self.pixels, -1)

    def kernel(self) -> Tensor:
        """[k, b, 3, 3]"""
        return self.weight.double().permute(0, 2, 1).reshape(self.case.k, self.case.b, 3, 3)

    def expected(self) -> dict[str, Tensor]:
        c = self.case
        weight, bias, mean, var = self.norm.double()
        rstd = (var + NORM_EPS).rsqrt()
        xhat = (self.z.double() - mean) * rstd
        v = weight * xhat + bias
        u = v.relu().to(c.dtype).double()
        x = self.rows(F.conv2d(self.image(u), self.kernel(), padding=1))
        if c.rate > 0:
            keep = dropout_mask(self.seed, 3, self.pixels, c.k, c.rate).view(self.pixels, c.k)
            x = x * keep / (1 - c.rate)
        grad = self.image(self.d)
        du = self.rows(torch.nn.grad.conv2d_input(self.image(u).shape, self.kernel(), grad, padding=1))
        dv = torch.where(v <= 0, 0.0, du)
        dweight = torch.nn.grad.conv2d_weight(self.image(u), self.kernel().shape, grad, padding=1)
        return {
            "x": x,
            "dv": dv,
            "dgamma": (dv * xhat).sum(0),
            "dbeta": dv.sum(0),
            "dweight": dweight.flatten(2).transpose(1, 2),
        }


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def errors(problem: Problem, library: ctypes.CDLL, stems: tuple[str, ...] = STEMS) -> dict[str, float]:
    """Of each result, in units of its rounding."""
    expected, rounding = problem.expected(), ROUNDING[problem.case.dtype]
    found = {}
    if "forward" in stems:
        x, mean, var = problem.forward(library)
        stored = x.double()
        found["x"] = error(x, expected["x"]) / rounding
        exact = 2**-20 * stored.std().item()
        found["mean"] = ((mean - stored.mean(0)).abs().max() / exact).item()
        found["var"] = error(var, stored.var(0, correction=0)) / 2**-20
    if "input_gradient" in stems:
        dv, dgamma, dbeta = problem.input_gradient(library)
        found["dv"] = error(dv, expected["dv"]) / rounding
        found["dgamma"] = error(dgamma, expected["dgamma"]) / rounding
        found["dbeta"] = error(dbeta, expected["dbeta"]) / rounding
    if "weight_gradient" in stems:
        found["dweight"] = error(problem.weight_gradient(library), expected["dweight"]) / rounding
    return found


def check(problem: Problem, library: ctypes.CDLL, stems: tuple[str, ...] = STEMS) -> None:
    found = errors(problem, library, stems)
    assert all(value < 1 for value in found.values()), found


def schedule(library: ctypes.CDLL, backwards: bool, early: bool) -> None:
    library.set_schedule(backwards, early)


# The first takes two images a tile and one tile twice; the next cuts images; ragged, thin and single ones follow.
CASES = [
    Case(batch=5),
    Case(height=14, width=14, processors=3),
    Case(height=14, width=14, batch=1, b=128, k=32, first=32),
    Case(batch=3, height=5, width=9, k=16, rate=0.3),
    Case(batch=3, height=1, width=1, dtype=torch.float16),
    Case(batch=1, height=1, width=150, dtype=torch.float16, processors=2),
    Case(batch=3, height=21, width=1, k=10, first=3, behind=2),
    Case(batch=1, height=19, width=13, dtype=torch.float32, first=5),
    Case(batch=3, b=96, k=24, first=8, dtype=torch.float16),
    Case(height=9, width=10, b=128, k=48, first=16, dtype=torch.float16, shared=SMALL, rate=0.3),
]


@pytest.mark.parametrize(("backwards", "early"), SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernels_in_every_schedule(kernels, case, backwards, early):
    schedule(kernels, backwards, early)
    check(Problem(case), kernels)


def test_plans(kernels):
    """The cases above run with the next tile on its way and without, with whole weights and with parts of them."""

    def plan(case: Case) -> tuple[int, ...]:
        shape = (ctypes.c_int64 * 5)(case.batch, case.height, case.width, case.b, case.k)
        values = (ctypes.c_int64 * 4)()
        kernels.forward_plan(shape, ctypes.c_int64(case.processors), ctypes.c_int64(case.shared), values)
        return tuple(values)

    plans = [plan(case) for case in CASES]
    assert {buffers for _, buffers, _, _ in plans} == {1, 2}
    assert min(parts for _, _, parts, _ in plans) == 1
    assert max(parts for _, _, parts, _ in plans) > 1
    assert all(0 < used <= case.shared for (_, _, _, used), case in zip(plans, CASES, strict=True))
    assert plan(Case(b=192, k=48, shared=SMALL))[3] == 0  # nothing fits


@pytest.mark.parametrize(
    ("side", "most"), [(56, 1.0), (28, 1.05), (14, 1.1), (7, 1.15), (32, 1.0), (16, 1.0), (8, 1.0)]
)
def test_pixels_that_are_read_at_once_lie_in_different_banks(side, most):
    tile = conv_tile(64, side, side)
    assert sorted(tile.order) == list(range(tile.pixels))
    assert tile.wavefronts() <= most


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_no_plan_for_a_depth_that_is_no_multiple_of_a_product(kernels, dtype):
    """Here of one pixel, where float32 once gave NaN."""
    problem = Problem(Case(batch=1, height=1, width=1, b=24, k=4, dtype=dtype))
    for run in (problem.forward, problem.input_gradient, problem.weight_gradient):
        with pytest.raises(RuntimeError, match="no plan"):
            run(kernels)
