# SPDX-License-Identifier: Apache-2.0
"""The kernels of grouped 3x3 convolutions on the host: against float64, in every order of threads and copies.
tests/mutants.py plants mistakes that they must notice."""

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.emulation.build import HERE, ROOT, load

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bfloat16", HALF: "float16", FLOAT: "float32"}
ROUNDING = {BF16: 2**-8, HALF: 2**-11, FLOAT: 2**-21}  # of storage; float32 adds up some hundreds of numbers
NORM_EPS = 1e-3
UNTOUCHED = 77.0
SCHEDULES = [(backwards, early) for backwards in (False, True) for early in (False, True)]
LARGE, SMALL = 227 << 10, 99 << 10  # shared memory of a block: compute capability 9.0 and 8.6
NO_PLAN = (0, 0, 0, 0, 0, 0)

STEMS = ("forward", "input_gradient", "weight_gradient")
SOURCES = [ROOT / f"csrc/cuda/grouped_conv/grouped_conv_{stem}.cu" for stem in STEMS]
SOURCES += [ROOT / "csrc/cuda/norm_relu/norm_relu_backward.cu", HERE / "grouped_conv_entry.cpp"]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = load(dict.fromkeys(SOURCES))
    for dtype in NAMES.values():
        for stem in STEMS:
            getattr(library, f"{stem}_{dtype}").restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Case:
    channels: int = 4  # of a group
    groups: int = 4
    height: int = 7
    width: int = 7
    stride: int = 1
    batch: int = 2
    dtype: torch.dtype = BF16
    processors: int = 1
    shared: int = LARGE

    def arguments(self) -> tuple[object, ...]:
        shape = (self.batch, self.height, self.width, self.stride, self.groups, self.channels)
        return (ctypes.c_int64 * 6)(*shape), ctypes.c_int64(self.processors), ctypes.c_int64(self.shared)

    def plans(self, library: ctypes.CDLL) -> tuple[tuple[int, ...], ...]:
        """Channels of a part, parts, splits, buffers, pixels of a tile, bytes: of each kernel."""
        values = (ctypes.c_int64 * 18)()
        getattr(library, f"plans_{NAMES[self.dtype]}")(*self.arguments(), values)
        return tuple(tuple(values[i : i + 6]) for i in (0, 6, 12))


class Problem:
    """Random numbers of a case, and what the kernels make of them."""

    def __init__(self, case: Case) -> None:
        self.case = c = case
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.all = c.channels * c.groups
        self.out = (-(-c.height // c.stride), -(-c.width // c.stride))
        self.z = (normal(c.batch * c.height * c.width, self.all) + 0.3).to(c.dtype)
        self.d = normal(c.batch * self.out[0] * self.out[1], self.all).to(c.dtype)
        self.weight = (normal(self.all, 9, c.channels) * (2 / 9 / c.channels) ** 0.5).to(c.dtype)
        # weight, bias, mean, var
        n = self.all
        self.norm = torch.stack([normal(n).abs() + 0.5, normal(n) * 0.3 + 0.2, normal(n) * 0.2, normal(n).abs() + 0.5])

    def _call(self, library: ctypes.CDLL, stem: str, *arguments: Tensor | None) -> None:
        pointers = [None if a is None else ctypes.c_void_p(a.data_ptr()) for a in arguments]
        function = getattr(library, f"{stem}_{NAMES[self.case.dtype]}")
        said = function(*self.case.arguments(), *pointers).decode()
        if said:
            raise RuntimeError(said)

    def forward(self, library: ctypes.CDLL, moments: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The result, its mean and variance."""
        out = torch.full((len(self.d) + 1, self.all), UNTOUCHED, dtype=self.case.dtype)
        mean, var = torch.full((2, self.all), torch.nan)
        wanted = (mean, var) if moments else (None, None)
        self._call(library, "forward", self.z, self.norm, self.weight, out, *wanted)
        assert (out[-1] == UNTOUCHED).all()
        return out[:-1], mean, var

    def input_gradient(self, library: ctypes.CDLL) -> tuple[Tensor, Tensor, Tensor]:
        """dv and the gradients of the norm's parameters."""
        dv = torch.full((len(self.z) + 1, self.all), UNTOUCHED, dtype=self.case.dtype)
        dweight, dbias = torch.full((2, self.all), torch.nan)
        self._call(library, "input_gradient", self.d, self.weight, self.z, self.norm, dv, dweight, dbias)
        assert (dv[-1] == UNTOUCHED).all()
        return dv[:-1], dweight, dbias

    def weight_gradient(self, library: ctypes.CDLL) -> Tensor:
        dweight = torch.full(self.weight.shape, torch.nan)
        self._call(library, "weight_gradient", self.d, self.z, self.norm, dweight)
        return dweight

    def image(self, rows: Tensor, height: int, width: int) -> Tensor:
        return rows.double().view(self.case.batch, height, width, -1).permute(0, 3, 1, 2)

    def expected(self) -> dict[str, Tensor]:
        c = self.case
        weight, bias, mean, var = self.norm.double()
        xhat = (self.z.double() - mean) * (var + NORM_EPS).rsqrt()
        v = weight * xhat + bias
        u = self.image(v.relu().to(c.dtype).double(), c.height, c.width).requires_grad_()
        kernel = self.weight.double().permute(0, 2, 1).reshape(self.all, c.channels, 3, 3).requires_grad_()
        out = F.conv2d(u, kernel, padding=1, stride=c.stride, groups=c.groups)
        du, dkernel = torch.autograd.grad(out, (u, kernel), self.image(self.d, *self.out))
        dv = torch.where(v <= 0, 0.0, du.permute(0, 2, 3, 1).reshape(v.shape))
        return {
            "out": out.detach().permute(0, 2, 3, 1).reshape(len(self.d), -1),
            "dv": dv,
            "dgamma": (dv * xhat).sum(0),
            "dbeta": dv.sum(0),
            "dweight": dkernel.flatten(2).transpose(1, 2),
        }


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def errors(problem: Problem, library: ctypes.CDLL) -> dict[str, float]:
    """Of each result, in units of its rounding."""
    expected, rounding = problem.expected(), ROUNDING[problem.case.dtype]
    out, mean, var = problem.forward(library)
    dv, dgamma, dbeta = problem.input_gradient(library)
    actual = {"out": out, "dv": dv, "dgamma": dgamma, "dbeta": dbeta, "dweight": problem.weight_gradient(library)}
    found = {name: error(value, expected[name]) / rounding for name, value in actual.items()}
    if rounding > 2**-12:
        found["dweight"] *= 50  # which is not rounded to storage
    stored, exact = out.double(), 2**-20
    found["mean"] = ((mean - stored.mean(0)).abs().max() / (exact * stored.std(correction=0).clamp_min(1e-3))).item()
    found["var"] = error(var, stored.var(0, correction=0)) / exact
    return found


def check(problem: Problem, library: ctypes.CDLL) -> None:
    found = errors(problem, library)
    assert all(value < 1 for value in found.values()), found


# Groups that are parts of a chunk, whole chunks and several, or lie across them; parts of the channels and all of them;
# tiles that are whole images, or ragged; one pixel, and lines of one.
CASES = [
    Case(),
    Case(2, 12, 9, 20, processors=2),
    Case(3, 16, 14, 14, processors=3),
    Case(5, 8, 5, 9, dtype=HALF),
    Case(6, 12, 6, 11, stride=2, processors=2),
    Case(8, 11, 15, 13, dtype=HALF, processors=2),
    Case(12, 8, 8, 8, stride=2, dtype=HALF),
    Case(16, 5, 7, 10, stride=2),
    Case(24, 2, 7, 7, stride=2, batch=1),
    Case(32, 3, 7, 7, dtype=HALF),
    Case(10, 4, 1, 1, batch=3),
    Case(4, 6, 1, 150, batch=1, processors=2),
    Case(4, 4, 21, 1, stride=2, batch=3, dtype=HALF),
    Case(4, 32, 17, 18, stride=2, shared=SMALL, processors=2),
    Case(4, 16, 12, 33, shared=SMALL, batch=1),
    Case(16, 4, 17, 33, stride=2, shared=SMALL, batch=1, dtype=HALF),
    Case(4, 9, 9, 20, dtype=FLOAT, processors=2),
    Case(8, 4, 9, 30, stride=2, shared=SMALL, dtype=FLOAT),
    Case(3, 12, 7, 7, dtype=FLOAT, stride=2),
    Case(2, 6, 8, 15, dtype=FLOAT, batch=3),
    Case(6, 4, 5, 9, dtype=FLOAT),
    Case(8, 5, 12, 13, dtype=FLOAT, stride=2, processors=3),
    Case(32, 2, 7, 7, dtype=FLOAT, batch=1),
    Case(24, 2, 6, 5, dtype=FLOAT, stride=2, shared=SMALL),
    Case(4, 2, 1, 1, dtype=FLOAT, stride=2, batch=3),
]


@pytest.mark.parametrize(("backwards", "early"), SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernels_in_every_schedule(kernels, case, backwards, early):
    kernels.set_schedule(backwards, early)
    check(Problem(case), kernels)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_reruns_in_another_order_give_the_same_bits(kernels, dtype):
    problem = Problem(Case(6, 8, 19, 11, stride=2, dtype=dtype, processors=2))
    found = []
    for backwards, early in SCHEDULES:
        kernels.set_schedule(backwards, early)
        found.append([*problem.forward(kernels), *problem.input_gradient(kernels), problem.weight_gradient(kernels)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_moments_that_are_not_wanted(kernels, dtype):
    problem = Problem(Case(4, 4, 9, 9, dtype=dtype))
    expected, _, _ = problem.forward(kernels)
    out, mean, _ = problem.forward(kernels, moments=False)
    assert torch.equal(out, expected)
    assert mean.isnan().all()


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_moments_of_a_large_mean_are_exact(kernels, dtype):
    """Squares would cancel."""
    problem = Problem(Case(4, 4, 12, 12, dtype=dtype, processors=2))
    problem.norm[0] *= 0.05
    problem.norm[1] = 8
    problem.weight[:, [0, 1, 2, 3, 5, 6, 7, 8]] = 0  # edges are like other pixels
    out, _, var = problem.forward(kernels)
    assert (out.double().mean(0).abs() > 50 * out.double().std(0)).any()
    assert error(var, out.double().var(0, correction=0)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_numbers_that_are_not_finite_stay_at_the_pixels_that_read_them(kernels, dtype, stride, value):
    """And with float32 in their group."""
    case = Case(4, 8, 9, 10, stride=stride, dtype=dtype)
    problem, tainted = Problem(case), Problem(case)
    at = (4 * case.width + 5, 6)  # of group 1
    tainted.z[at] = value
    expected, out = problem.forward(kernels)[0], tainted.forward(kernels)[0]
    exact = tainted.expected()["out"].isfinite()
    pixels = exact.all(1, keepdim=True).expand_as(exact)
    assert torch.equal(out.isfinite() & pixels, pixels)
    assert torch.equal(out[pixels], expected[pixels])
    assert not out[~exact].isfinite().any()
    if dtype == FLOAT:
        assert torch.equal(out.isfinite(), exact)


@pytest.mark.parametrize("size", [(13, 11), (5, 131), (5, 261)], ids=str)  # 131 columns are no whole tiles
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_pixels_beyond_the_image_do_not_count_in_gradients_of_weights(kernels, dtype, stride, size):
    """They would read the last line and column, at taps that never do; and zero times infinity is no number."""
    problem = Problem(Case(4, 4, *size, stride=stride, dtype=dtype, processors=2))
    problem.z[-1, 6] = torch.nan
    problem.z[0, 5] = torch.inf
    expected = problem.expected()["dweight"]
    assert 0 < expected.isnan().sum() < 36
    assert torch.equal(problem.weight_gradient(kernels).isnan(), expected.isnan())


def every_network() -> list[tuple[int, int, int, int]]:
    """Width, groups, side and stride of the 3x3s of DPN-68, 92, 98, 107 and 131."""
    networks = [(128, 32), (96, 32), (160, 40), (200, 50)]
    return [
        (width << stage, groups, 56 >> stage << (stride - 1), stride)
        for width, groups in networks
        for stage in range(4)
        for stride in (1, 2)
        if stage > 0 or stride == 1
    ]


@pytest.mark.parametrize("shared", [LARGE, 163 << 10, SMALL])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_every_network_has_plans(kernels, dtype, shared):
    for width, groups, side, stride in every_network():
        case = Case(width // groups, groups, side, side, stride, 64, dtype, 132, shared)
        for channels, parts, splits, buffers, pixels, used in case.plans(kernels):
            assert 0 < used <= shared
            assert channels % case.channels == 0
            assert channels * dtype.itemsize % 16 == 0
            assert (parts - 1) * channels < width <= parts * channels
            assert 1 <= splits <= 2 * 132
            assert buffers in (1, 2)
            assert 16 <= pixels <= 128


def test_plans_differ(kernels):
    """The cases above run with the next tile on its way and without, and with several tiles a block."""
    plans = [plan for case in CASES for plan in case.plans(kernels)]
    assert {buffers for _, _, _, buffers, _, _ in plans} == {1, 2}
    assert {parts for _, parts, _, _, _, _ in plans} > {1, 2}
    assert max(splits for _, _, splits, _, _, _ in plans) > 2


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 16),
        Case(33, 8),
        Case(9, 16),  # whole groups in whole chunks are 72 channels
        Case(20, 8),  # a chunk of 8 reads five
        Case(4, 5),  # rows of 40 bytes
        Case(5, 8, dtype=FLOAT),
        Case(4, 4, stride=3),
        Case(4, 4, batch=0),
        Case(4, (1 << 17) + 2, 1, 1, batch=1),  # more parts than a grid has
        Case(32, 8, shared=16 << 10),
    ],
    ids=str,
)
def test_shapes_without_a_kernel_have_no_plan(kernels, case):
    assert case.plans(kernels)[0] == NO_PLAN
    problem = Problem(replace(case, stride=1, batch=1))
    problem.case = case
    with pytest.raises(RuntimeError, match="no plan"):
        problem.forward(kernels)
