# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling: exact rationals, the libraries it follows, and what must hold without any of them."""

import itertools
import math
from fractions import Fraction

import cv2
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdense import _C, bicubic_resize, reference
from fastdense.ops.bicubic import PRESETS
from tests.cases.bicubic import SHAPES, as_batch, expected, photograph, random
from tests.cases.simd import LEVELS, available_levels, simd_level

# Scalar maths and exact values


@pytest.mark.parametrize(
    ("a", "t", "weights"),
    [
        (-0.5, Fraction(1, 2), "-1/16 9/16 9/16 -1/16"),
        (-0.5, Fraction(1, 4), "-9/128 111/128 29/128 -3/128"),
        (-0.5, Fraction(1, 3), "-2/27 7/9 1/3 -1/27"),
        (-0.5, Fraction(3, 8), "-75/1024 745/1024 399/1024 -45/1024"),
        (-0.75, Fraction(1, 2), "-3/32 19/32 19/32 -3/32"),
        (-0.75, Fraction(1, 4), "-27/256 225/256 67/256 -9/256"),
        (-0.75, Fraction(1, 3), "-1/9 43/54 10/27 -1/18"),
        (-0.75, Fraction(3, 8), "-225/2048 1535/2048 873/2048 -135/2048"),
    ],
)
def test_cubic_kernel(a, t, weights):
    for offset, weight in zip((-1, 0, 1, 2), weights.split(), strict=True):
        assert _C.scalar.cubic_kernel(float(t - offset), a) == pytest.approx(float(Fraction(weight)), abs=1e-15)


@pytest.mark.parametrize(
    ("n", "m", "antialias", "matlab", "pillow"),
    [
        (8, 4, True, "115/256 637/256 1155/256 1677/256", "130/239 91/37 168/37 1543/239"),
        (8, 2, True, "1409/1024 5759/1024", "3219/1916 10193/1916"),
        (15, 5, True, "73/81 323/81 7 811/81 1061/81", "16/15 323/82 7 825/82 194/15"),
        (15, 3, True, "1137/625 7 7613/625", "203/96 7 1141/96"),
        (8, 3, True, "323/429 7/2 2680/429", "6061/6761 7/2 41266/6761"),
        (4, 3, True, "68/453 3/2 1291/453", "83/437 3/2 1228/437"),
        (4, 3, False, "47/432 3/2 1249/432", "47/457 3/2 1324/457"),
        (4, 5, True, "-9/200 1337/2000 3/2 4663/2000 609/200", "-9/208 1337/2063 3/2 4852/2063 633/208"),
    ],
)
def test_exact_rationals(n, m, antialias, matlab, pillow):
    x = torch.arange(n, dtype=torch.float64).view(1, 1, n)
    for preset, values in (("matlab", matlab), ("torch_antialias", pillow), ("pillow", pillow)):
        wanted = torch.tensor([float(Fraction(v)) for v in values.split()], dtype=torch.float64)
        made = bicubic_resize(x, m, preset=preset, antialias=antialias)
        torch.testing.assert_close(made.flatten(), wanted, rtol=1e-12, atol=1e-12)
        # Two axes: arange(n * n) is n * rows + columns.
        image = torch.arange(n * n, dtype=torch.float64).view(1, 1, n, n)
        made = bicubic_resize(image, m, preset=preset, antialias=antialias)[0, 0]
        torch.testing.assert_close(made, n * wanted[:, None] + wanted, rtol=1e-12, atol=1e-12)


# Against the reference, and the reference against torch


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_preset_at_every_simd_level(level, preset):
    if level not in available_levels():
        with pytest.raises(ValueError, match=level), simd_level(level):
            pass
        return
    with simd_level(level):
        for (old, new), channels in itertools.product(SHAPES, (1, 3, 21)):
            x = random(2, channels, *old)
            for layout in (torch.contiguous_format, torch.channels_last):
                made = bicubic_resize(x.to(memory_format=layout), new, preset=preset)
                torch.testing.assert_close(made, expected(x, new, preset), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(9,), (5, 12), (4, 13, 6)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_to_three_axes_and_their_gradients(preset, size):
    x = random(2, 3, *(7, 8, 9)[: len(size)]).requires_grad_()
    out, wanted = bicubic_resize(x, size, preset=preset), expected(x, size, preset)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    grad = random(*out.shape)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (out, wanted)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_torch(old, new, antialias, corners):
    if antialias and new[1] == 1:
        pytest.fail("torch is wrong there: see test_width_one_with_antialias")
    x = random(2, 3, *old)
    wanted = F.interpolate(x, new, mode="bicubic", antialias=antialias, align_corners=corners)
    preset = "torch_antialias" if antialias else "torch"
    torch.testing.assert_close(
        bicubic_resize(x, new, preset=preset, align_corners=corners), wanted, rtol=1e-12, atol=1e-12
    )
    single = bicubic_resize(x.float(), new, preset=preset, align_corners=corners)
    # torch computes its own float32 coordinates: the error of ours is against its float64 result.
    torch.testing.assert_close(single.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.7, 0.6, 120 / 88, (2.0, 0.5)])
def test_torch_with_a_scale(scale):
    x = random(1, 2, 14, 15)
    wanted = F.interpolate(x, scale_factor=scale, mode="bicubic")
    torch.testing.assert_close(bicubic_resize(x, scale_factor=scale), wanted, rtol=1e-12, atol=1e-12)


def test_width_one_with_antialias():
    """torch gives every row the values of the first."""
    x = torch.arange(8, dtype=torch.float64).view(1, 1, 8, 1)
    wanted = torch.tensor([130 / 239, 91 / 37, 168 / 37, 1543 / 239], dtype=torch.float64).view(1, 1, 4, 1)
    torch.testing.assert_close(bicubic_resize(x, (4, 1), preset="torch_antialias"), wanted, rtol=1e-12, atol=1e-12)
    turned = bicubic_resize(x.movedim(2, 3), (1, 4), preset="torch_antialias")
    torch.testing.assert_close(turned, wanted.movedim(2, 3), rtol=1e-12, atol=1e-12)


# Bytes


BYTE_SIZES = [(122, 94), (30, 23), (99, 47), (61, 100), (77, 33), (200, 5), (1, 1), (20, 16)]


@pytest.mark.parametrize("size", BYTE_SIZES)
def test_bytes_equal_pillow(size):
    wanted = numpy.asarray(Image.fromarray(photograph()).resize(size[::-1], Image.Resampling.BICUBIC))
    for level in available_levels():
        with simd_level(level):
            for batch in (as_batch(photograph()), as_batch(photograph()).contiguous()):
                made = bicubic_resize(batch, size, preset="pillow")
                assert numpy.array_equal(made[0].movedim(0, -1).numpy(), wanted)


@pytest.mark.parametrize("size", BYTE_SIZES)
def test_bytes_are_those_of_opencv(size):
    wanted = cv2.resize(photograph(), size[::-1], interpolation=cv2.INTER_CUBIC)
    made = bicubic_resize(as_batch(photograph()), size, preset="opencv")
    difference = numpy.abs(made[0].movedim(0, -1).numpy().astype(int) - wanted)
    if _C.build_info()["simd"] in ("avx512", "avx512_bf16", "amx"):
        assert difference.max() == 0
    # Elsewhere OpenCV may sum in float32 in another order: a half may fall either way.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [(30, 23), (122, 94), (30, 94), (15, 20)])
def test_bytes_of_matlab_are_rounded_after_each_axis(size):
    x = as_batch(photograph())
    steps = [n / m for n, m in zip(x.shape[2:], size, strict=True)]
    out = x.double()
    for axis in sorted((2, 3), key=lambda axis: -steps[axis - 2]):  # the smaller scale first
        sizes = [size[d] if d + 2 == axis else out.shape[d + 2] for d in range(2)]
        widths = [steps[d] if d + 2 == axis else 1.0 for d in range(2)]
        out = reference.bicubic(out, sizes, widths, -0.5, True, "symmetric", False)
        out = (out.clamp(0, 255) + 0.5).floor()
    assert torch.equal(bicubic_resize(x, size, preset="matlab"), out.to(torch.uint8))


@pytest.mark.parametrize("preset", ["torch", "torch_antialias", "opencv"])
def test_bytes_of_volumes_are_rounded_once(preset):
    volume = torch.randint(0, 256, (1, 2, 5, 6, 7), dtype=torch.uint8)
    wanted = expected(volume.double(), (9, 4, 7), preset).clamp(0, 255).round()
    assert (bicubic_resize(volume, (9, 4, 7), preset=preset).double() - wanted).abs().max() <= 1


def test_bytes_to_floating_point():
    x = as_batch(photograph())
    made = bicubic_resize(x, (90, 31), out_dtype=torch.float32)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, bicubic_resize(x.float(), (90, 31)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_floating_point_to_bytes_is_rounded_and_saturated(dtype):
    x = as_batch(photograph()).to(dtype)
    x = x * 2 - 100  # leaves the range of bytes at both ends
    exact = expected(x.double(), (90, 31), "torch")
    assert exact.min() < 0 and exact.max() > 255
    made = bicubic_resize(x, (90, 31), out_dtype=torch.uint8)
    rounding = 1 if dtype == torch.bfloat16 else 0.501
    assert made.dtype == torch.uint8
    assert (made.double() - exact.clamp(0, 255)).abs().max() <= rounding
    made = bicubic_resize(x, (90, 31), out_dtype=torch.uint8, clamp=(10, 20))
    assert made.unique().tolist() == list(range(10, 21))


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "either size or scale_factor"),
        ({"size": 4, "scale_factor": 2.0}, "either size or scale_factor"),
        ({"size": 0}, "size to be positive integers, got 0"),
        ({"size": (4, -1)}, "size to be positive integers"),
        ({"size": (4, 2.5)}, "size to be positive integers"),
        ({"size": (4, 4, 4)}, "size to be one number or 2"),
        ({"scale_factor": math.nan}, "scale_factor to be finite and positive, got nan"),
        ({"scale_factor": math.inf}, "scale_factor to be finite and positive"),
        ({"scale_factor": -1.0}, "scale_factor to be finite and positive"),
        ({"scale_factor": 0.01}, "large enough"),
        (
            {"size": 4, "preset": "gimp"},
            "preset to be one of torch, torch_antialias, pillow, pillow12, opencv, matlab, got 'gimp'",
        ),
        ({"size": 4, "border": "wrap"}, "border to be one of clamp, drop, symmetric"),
        ({"size": 4, "rounding": "up"}, "rounding to be one of floor, round, even, ceil"),
        ({"size": 4, "a": math.inf}, "a to be finite"),
        *(
            ({"size": 4, "clamp": clamp}, "clamp to be a lowest and a highest value")
            for clamp in ((1, 0), (0, math.nan), 1, (0,), (0, 1, 2))
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"bicubic_resize: expected .*{message}"):
        bicubic_resize(torch.zeros(1, 1, 5, 5), **kwargs)


def test_bad_tensors():
    with pytest.raises(TypeError, match=r"input to be floating point or uint8, got torch\.int32"):
        bicubic_resize(torch.zeros(1, 1, 5, dtype=torch.int32), 3)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"out_dtype to be floating point or uint8, got {dtype}"):
            bicubic_resize(torch.zeros(1, 1, 5, 5), 3, out_dtype=dtype)
    with pytest.raises(ValueError, match="3 to 5 dimensions"):
        bicubic_resize(torch.zeros(5, 5), 3)
    with pytest.raises(ValueError, match="positive spatial sizes"):
        bicubic_resize(torch.zeros(1, 1, 0, 5), 3)
    with pytest.raises(ValueError, match="residual to have shape"):
        bicubic_resize(torch.zeros(1, 1, 5, 5), 3, residual=torch.zeros(1, 1, 3, 4))
    with pytest.raises(TypeError, match="residual to be float32 like input"):
        bicubic_resize(torch.zeros(1, 1, 5, 5), 3, residual=torch.zeros(1, 1, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="None for uint8"):
        bicubic_resize(torch.zeros(1, 1, 5, 5, dtype=torch.uint8), 3, clamp=(0, 1))
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        bicubic_resize(torch.zeros(1, 1, 5, 5, 5, dtype=torch.uint8), 3, preset="pillow")
