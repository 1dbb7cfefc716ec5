# SPDX-License-Identifier: Apache-2.0
"""Bytes of the presets against the libraries they follow, for random sizes, and sizes that follow from a scale."""

import math

import cv2
import numpy
import PIL
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdense import _C, bicubic_resize
from fastdense.nn import BicubicUpsample
from fastdense.sr.resize_samples import resize_samples
from tests.cases.pillow import DIGESTS, cases, digest, resize_by_pillow
from tests.cases.simd import available_levels, simd_level


def resize_by(preset: str):
    def resize(picture: numpy.ndarray, size: tuple[int, int]) -> numpy.ndarray:
        return bicubic_resize(torch.from_numpy(picture.copy())[None, None], size, preset=preset)[0, 0].numpy()

    return resize


def test_bytes_equal_pillow_for_1000_random_sizes():
    """Among them 328 of which Pillow 13 takes the rows first."""
    assert int(PIL.__version__.partition(".")[0]) == 13
    resize, rows_first = resize_by("pillow"), 0
    for picture, size in cases(1000, "another"):
        assert numpy.array_equal(resize(picture, size), resize_by_pillow(picture, size)), (picture.shape, size)
        rows_first += _C.scalar.pillow_rows_first(*picture.shape, *size)
    assert rows_first == 328


@pytest.mark.parametrize("version", DIGESTS)
def test_bytes_equal_any_pillow_whatever_is_installed(version):
    assert digest(resize_by("pillow" if version >= "13" else "pillow12")) == DIGESTS[version]


@pytest.mark.parametrize(
    ("sizes", "rows_first"),
    [
        ((10, 10, 9, 10), True),
        ((10, 10, 8, 9), False),
        ((10, 10, 7, 9), True),
        ((9, 9, 9, 12), False),
        ((9, 1, 8, 9), True),
    ],
)
def test_which_axis_pillow_takes_first(sizes, rows_first):
    """Rows that shrink by 1, 2 and 3 where columns shrink by 0, 1 and 1; that stay; where columns grow."""
    assert _C.scalar.pillow_rows_first(*sizes) is rows_first


def torch_cases(count: int):
    random = numpy.random.default_rng(0)
    for _ in range(count):
        shape = [*random.integers(1, 3, 1), *random.integers(1, 6, 1), *random.integers(1, 60, 2)]
        x = torch.from_numpy(random.integers(0, 256, shape, dtype=numpy.uint8))
        x = x if random.integers(2) else (x > 127).to(torch.uint8) * 255
        x = x if random.integers(2) else x.contiguous(memory_format=torch.channels_last)
        # torch is wrong where the result is one sample wide: docs/bicubic.md, Exactness
        yield x, (int(random.integers(1, 60)), int(random.integers(2, 60))), bool(random.integers(2))


@pytest.mark.parametrize("preset", ["torch", "torch_antialias"])
def test_bytes_equal_torch_for_random_sizes(preset):
    antialias = preset == "torch_antialias"
    for x, size, corners in torch_cases(300):
        wanted = F.interpolate(x, size, mode="bicubic", antialias=antialias, align_corners=corners)
        made = bicubic_resize(x, size, preset=preset, align_corners=corners)
        assert torch.equal(made, wanted), (x.shape, size, corners)


SIZES = [((40, 50), (33, 70)), ((9, 600), (9, 17)), ((600, 9), (17, 9)), ((50, 90), (40, 20)), ((31, 300), (62, 40))]


@pytest.mark.parametrize("channels", [1, 3, 17])
@pytest.mark.parametrize("antialias", [False, True])
def test_bytes_equal_torch_at_every_simd_level(channels, antialias):
    """Where a block of elements reads few, some and many others; for one axis, interleaved channels, many channels."""
    for size, wanted_size in SIZES:
        x = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
        wanted = F.interpolate(x, wanted_size, mode="bicubic", antialias=antialias)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            for level in available_levels():
                with simd_level(level):
                    made = bicubic_resize(given, wanted_size, preset="torch_antialias" if antialias else "torch")
                assert torch.equal(made, wanted), (size, wanted_size, layout, level)


@pytest.mark.parametrize("preset", ["torch", "torch_antialias"])
def test_bytes_equal_torch_for_random_scales(preset):
    """Some of which leave the size of an axis as it is, which torch then does not resample."""
    random, kept = numpy.random.default_rng(1), 0
    for x, _, _ in torch_cases(100):
        scale = tuple(random.uniform(1, 1.5, 2).tolist())
        wanted = F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=preset == "torch_antialias")
        if wanted.shape[3] > 1:
            assert torch.equal(bicubic_resize(x, scale_factor=scale, preset=preset), wanted), (x.shape, scale)
            kept += wanted.shape[2] == x.shape[2]
    assert kept > 5


def test_an_axis_that_keeps_its_size_is_left_alone_where_torch_does_so():
    x = torch.rand(1, 2, 5, 9, dtype=torch.float64)
    for antialias in (False, True):
        wanted = F.interpolate(x, scale_factor=(1.1, 2.0), mode="bicubic", antialias=antialias)
        made = bicubic_resize(x, scale_factor=(1.1, 2.0), preset="torch_antialias" if antialias else "torch")
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_torchs_bytes_by_hand():
    """At -1/4, 1/4, 3/4 and 5/4 of two samples 255 and 0 whose edges repeat.

    At 1/4 the weights of samples -1, 0, 1, 2 are -27, 225, 67, -9 of 256: 198 of the first, 255 * 198 / 256 = 197.2. At
    -1/4 the first has (-9 + 67 + 225) / 256 = 283 / 256, which is clipped.
    """
    x = torch.tensor([[[[255, 0]]]], dtype=torch.uint8)
    assert bicubic_resize(x, (1, 4), preset="torch")[0, 0, 0].tolist() == [255, 197, 58, 0]


# Sizes that follow from a scale ---------------------------------------------------------------------------------------


def test_opencvs_sizes_round_halves_to_even():
    for n in range(1, 40):
        for scale in (0.5, 1.5, 2.5, 0.25, 1.25, 0.3):
            picture = numpy.zeros((n, n), numpy.uint8)
            wanted = round(n * scale)
            x = torch.from_numpy(picture)[None, None]
            if wanted == 0:
                with pytest.raises(ValueError, match="large enough"):
                    bicubic_resize(x, scale_factor=scale, preset="opencv")
                continue
            assert cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC).shape[0] == wanted
            assert bicubic_resize(x, scale_factor=scale, preset="opencv").shape[2] == wanted


@pytest.mark.parametrize(
    ("preset", "size"), [("torch", 2), ("torch_antialias", 2), ("pillow", 3), ("opencv", 2), ("matlab", 3)]
)
def test_half_of_five(preset, size):
    assert bicubic_resize(torch.zeros(1, 1, 5, 5), scale_factor=0.5, preset=preset).shape[2:] == (size, size)


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [numpy.int64(6), (numpy.int64(6), numpy.int32(6)), numpy.array([6, 6]), torch.tensor(6), torch.tensor([6, 6])],
)
def test_sizes_of_other_libraries(size):
    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(bicubic_resize(x, size), bicubic_resize(x, 6))


@pytest.mark.parametrize(
    "scale", [numpy.float32(2), numpy.int64(2), (numpy.float64(2), 2), numpy.array([2.0, 2.0]), torch.tensor(2.0)]
)
def test_scales_of_other_libraries(scale):
    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(bicubic_resize(x, scale_factor=scale), bicubic_resize(x, scale_factor=2))
    assert torch.equal(BicubicUpsample(scale)(x), bicubic_resize(x, scale_factor=2))


@pytest.mark.parametrize("size", [numpy.float64(6), numpy.bool_(True), numpy.array([6, 6, 6]), numpy.array(["6"])])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="bicubic_resize: expected size to be"):
        bicubic_resize(torch.rand(1, 2, 3, 4), size)


def test_an_image_without_its_batch_is_not_a_signal():
    image = torch.rand(3, 24, 39)
    message = r"shape \[N, C, H, W\] with scale_factor, got three dimensions; write input\[None\] for one image"
    with pytest.raises(ValueError, match=message):
        bicubic_resize(image, scale_factor=2)
    assert bicubic_resize(image[None], scale_factor=2).shape == (1, 3, 48, 78)
    assert bicubic_resize(image, scale_factor=(2,)).shape == (3, 24, 78)


# Scales that no table can hold ----------------------------------------------------------------------------------------


TOO_SMALL = [1e-9, 1e-19, 1e-300, 5e-324]


@pytest.mark.parametrize("scale", TOO_SMALL)
@pytest.mark.parametrize("preset", ["matlab", "torch_antialias", "torch"])
def test_a_tiny_scale_is_refused_at_once(scale, preset):
    """Its row of weights would have 4e9 entries, or its centre would be no number."""
    with pytest.raises(ValueError, match=r"expected step to be at least 0 and at most|finite and positive"):
        bicubic_resize(torch.rand(1, 1, 10, 10), scale_factor=scale, preset=preset, rounding="ceil", antialias=True)


@pytest.mark.parametrize("step", [1e9, 1e19, 1e308])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_huge_step_is_refused_by_every_operator(step, antialias):
    x, options = torch.rand(1, 1, 10), (-0.5, antialias, "symmetric", False)
    message = "expected step to be at least 0 and at most"
    with pytest.raises(ValueError, match=message):
        torch.ops.fastdense.bicubic(x, [1], [step], *options, None, -math.inf, math.inf)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastdense._bicubic_backward(torch.rand(1, 1, 1), [10], [step], *options)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastdense.bicubic_uint8(x.to(torch.uint8), [1], [step], *options, "last")
    with pytest.raises(ValueError, match="bicubic_rows: expected a step and sizes whose weights can be computed"):
        _C.bicubic_rows(10, 1, step, -0.5, antialias, "symmetric", False)


@pytest.mark.parametrize(
    "arguments", [{"scale_factor": 1e18}, {"scale_factor": 1e308}, {"size": 2**31}, {"size": 2**80}]
)
def test_a_huge_result_is_refused_at_once(arguments):
    with pytest.raises((ValueError, RuntimeError), match=r"small enough|below 2\^31|allocate"):
        bicubic_resize(torch.rand(1, 1, 14, 14), **arguments)


def test_a_matrix_of_export_is_bounded():
    with pytest.raises(ValueError, match="bicubic_rows"):
        _C.bicubic_rows(1 << 15, 1 << 15, 1.0, -0.5, False, "clamp", False)


@pytest.mark.parametrize("a", [-3.0, 40.0])
def test_a_cubic_whose_sums_leave_32_bits_is_refused(a):
    x = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected a for which the absolute weights of a sample sum to at most 2"):
        bicubic_resize(x, 9, a=a, preset="pillow")
    assert bicubic_resize(x, 9, a=-2.0).dtype == torch.uint8


# 16 bits --------------------------------------------------------------------------------------------------------------


def by_columns_and_rows(picture: numpy.ndarray, size: tuple[int, int]) -> Tensor:
    x = torch.from_numpy(picture.astype(numpy.float64))[None, None]
    return bicubic_resize(x, size, preset="torch_antialias")[0, 0]


def test_16_bits_equal_pillow():
    """But for ties: Pillow clips and rounds after each axis, and sums in another order. The others round once."""
    unequal = total = 0
    for picture, size in cases(100, "deep"):
        deep = picture.astype(numpy.uint16) * 257
        made = resize_samples(deep, size, None, "pillow")
        difference = numpy.abs(made.astype(int) - resize_by_pillow(deep, size))
        assert made.dtype == numpy.uint16 and difference.max() <= 1
        unequal, total = unequal + numpy.count_nonzero(difference), total + difference.size
        wanted = (by_columns_and_rows(deep, size).clamp(0, 65535) + 0.5).floor().numpy()
        assert numpy.array_equal(resize_samples(deep, size, None, "torch_antialias"), wanted)
    assert unequal < 1e-3 * total
