# SPDX-License-Identifier: Apache-2.0
"""How close an enlarged picture is to the original, by the protocol of the super-resolution literature."""

import math
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastdense.models.sr.base import SuperResolutionNet
from fastdense.ops.bicubic import bicubic_resize
from fastdense.sr.upscaling import upscale

# MATLAB's rgb2ycbcr: luminance and the two chroma of RGB in [0, 1], scaled to [0, 255].
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


_YCBCR_OFFSET = (16.0, 128.0, 128.0)


def _matrix(like: Tensor) -> tuple[Tensor, Tensor]:
    matrix = torch.tensor(_YCBCR, dtype=torch.float64).to(like) / 255
    return matrix, torch.tensor(_YCBCR_OFFSET, dtype=torch.float64).to(like).view(3, 1, 1) / 255


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """``[N, 3, H, W]`` in [0, 1] to MATLAB's YCbCr divided by 255."""
    matrix, offset = _matrix(rgb)
    return torch.einsum("dc,nchw->ndhw", matrix, rgb) + offset


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """The inverse of :func:`rgb_to_ycbcr`."""
    matrix, offset = _matrix(ycbcr)
    return torch.einsum("dc,nchw->ndhw", torch.linalg.inv(matrix.double()).to(ycbcr), ycbcr - offset)


def luminance(picture: NDArray[numpy.uint8]) -> Tensor:
    """Y of uint8 ``[H, W]`` (as it is) or ``[H, W, 3]``, float64 ``[1, 1, H, W]``, rounded to integers."""
    samples = torch.from_numpy(picture.astype(numpy.float64))
    if samples.dim() == 2:
        return samples[None, None]
    return _round(rgb_to_ycbcr(samples.permute(2, 0, 1)[None] / 255)[:, :1] * 255)


def _round(values: Tensor) -> Tensor:
    return (values.clamp(0, 255) + 0.5).floor()


def psnr(picture: Tensor, original: Tensor, shave: int) -> float:
    """``10 log10(255^2 / MSE)`` without ``shave`` pixels at each border; infinite for equal pictures, NaN with NaN."""
    error = (_shaved(picture, shave) - _shaved(original, shave)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(picture: Tensor, original: Tensor, shave: int) -> float:
    """Structural similarity: Gaussian window of 11 x 11 with sigma 1.5, its valid area, K = 0.01 and 0.03, L = 255.

    Reference:
        Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli. Image Quality Assessment: From Error Visibility to
        Structural Similarity. IEEE TIP 2004, equation 13.
    """
    x, y = _shaved(picture, shave), _shaved(original, shave)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"ssim: expected pictures of 11 x 11 pixels or more after shaving, got {tuple(x.shape[2:])}")
    line = torch.exp(-((torch.arange(11, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def _shaved(picture: Tensor, shave: int) -> Tensor:
    return picture[..., shave : picture.shape[-2] - shave, shave : picture.shape[-1] - shave]


def smallest_measured(scale: int) -> int:
    """Pixels that a side of a picture needs for the window of SSIM, without ``scale`` at each border.

    It is a multiple of the scale, to which pictures are cropped.
    """
    return -(-(11 + 2 * scale) // scale) * scale


class Quality(NamedTuple):
    """PSNR in dB and SSIM of bicubic enlargement and of a network, None without one."""

    bicubic_psnr: float
    bicubic_ssim: float
    psnr: float | None
    ssim: float | None


def evaluate_image(
    picture: NDArray[numpy.uint8], scale: int, net: SuperResolutionNet | None = None
) -> tuple[Quality, Tensor, Tensor]:
    """Shrinks a picture, enlarges it again, and compares the luminance.

    The picture is cropped to a multiple of ``scale`` from its upper left corner. The baseline shrinks Y by MATLAB's
    bicubic in floating point without rounding. A network gets the small 8-bit picture that MATLAB would make, as RGB or
    Y. Results are clipped and rounded once. ``scale`` pixels at each border are left out.

    Args:
        picture: ``[H, W]`` or ``[H, W, 3]``, uint8.
        scale: 2, 3, 4, ...
        net: a network of that scale.

    Returns:
        The quality; and Y of the bicubic and of the network's picture, ``[1, 1, H, W]`` in 0 ... 255 (the bicubic one
        twice without a network).

    Raises:
        ValueError: a network of another scale; a picture that is too small.
    """
    if net is not None and net.scale != scale:
        raise ValueError(f"evaluate: expected scale to be {net.scale} like the network's, got {scale}")
    height, width = picture.shape[:2]
    least = smallest_measured(scale)
    if min(height, width) < least:
        raise ValueError(f"evaluate: expected a picture of {least} pixels or more, got {width} x {height}")
    picture = picture[: height - height % scale, : width - width % scale]
    original = luminance(picture)
    small = bicubic_resize(original, scale_factor=1 / scale, preset="matlab")
    bicubic = _round(bicubic_resize(small, scale_factor=scale, preset="matlab"))
    baseline = psnr(bicubic, original, scale), ssim(bicubic, original, scale)
    if net is None:
        return Quality(*baseline, None, None), bicubic, bicubic
    made = _upscaled_luminance(picture, original, scale, net)
    return Quality(*baseline, psnr(made, original, scale), ssim(made, original, scale)), bicubic, made


class Compared(NamedTuple):
    """PSNR in dB and SSIM of a picture."""

    psnr: float
    ssim: float


def compare_images(
    picture: NDArray[numpy.uint8], original: NDArray[numpy.uint8], scale: int
) -> tuple[Compared, Tensor, Tensor]:
    """Compares the luminance of an enlarged picture with the truth, without ``scale`` pixels at each border.

    Args:
        picture: ``[H, W]`` or ``[H, W, 3]``, uint8.
        original: of the same size, or of up to ``scale - 1`` pixels more, which are cropped at its lower right edges.
        scale: by which the picture was enlarged.

    Returns:
        The quality; and Y of both, ``[1, 1, H, W]`` in 0 ... 255.

    Raises:
        ValueError: pictures of other sizes or channels, or that are too small.
    """
    if picture.ndim != original.ndim:
        raise ValueError(f"expected both pictures to be grey or both RGB, got {picture.shape} and {original.shape}")
    height, width = picture.shape[:2]
    sizes = [(original.shape[0], original.shape[1])]
    sizes.append((sizes[0][0] - sizes[0][0] % scale, sizes[0][1] - sizes[0][1] % scale))
    if (height, width) not in sizes:
        raise ValueError(f"expected a picture as large as the reference of {sizes[0]}, got {(height, width)}")
    made, truth = luminance(picture), luminance(original[:height, :width])
    return Compared(psnr(made, truth, scale), ssim(made, truth, scale)), made, truth


def _upscaled_luminance(picture: NDArray[numpy.uint8], y: Tensor, scale: int, net: SuperResolutionNet) -> Tensor:
    like = next(net.parameters())
    if net.colours == 1:
        large = y
    else:
        rgb = picture if picture.ndim == 3 else numpy.repeat(picture[..., None], 3, 2)
        large = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]
    small = bicubic_resize(large.to(torch.uint8), scale_factor=1 / scale, preset="matlab")
    made = upscale(net, small.to(like) / 255).cpu().double() * 255
    if not made.isfinite().all():
        raise ValueError(f"expected the network's result to be finite, got NaN or infinity in {like.dtype}")
    if net.colours == 1:
        return _round(made)
    if picture.ndim == 2:
        return _round(made.mean(1, keepdim=True))
    return _round(rgb_to_ycbcr(_round(made) / 255)[:, :1] * 255)
