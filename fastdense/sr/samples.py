# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a picture mean: alpha, white, depth.

Samples are ``[H, W]`` or ``[H, W, C]``: grey, grey and alpha, RGB, RGB and alpha for one to four channels.
"""

from __future__ import annotations

from typing import Any

import numpy


def has_alpha(samples: numpy.ndarray) -> bool:
    return samples.ndim == 3 and samples.shape[2] in (2, 4)


def is_opaque(samples: numpy.ndarray) -> bool:
    return not has_alpha(samples) or bool((samples[..., -1] == alpha_peak(samples.dtype)).all())


def alpha_peak(dtype: numpy.dtype) -> float:
    """Alpha of what is opaque."""
    return float(numpy.iinfo(dtype).max) if numpy.issubdtype(dtype, numpy.integer) else 1.0


def without_alpha(samples: numpy.ndarray) -> numpy.ndarray:
    """The colours of samples that have alpha, grey ones as ``[H, W]``."""
    return samples[..., 0] if samples.shape[2] == 2 else samples[..., :3]


def peak_of(samples: numpy.ndarray) -> float:
    """The number that stands for white, where black is 0.

    It follows from the type for 8 and 16 bits, and is 1 for floating point. 32-bit and signed integers do not tell; if
    they need more than 8 bits and fit into 16, they are taken for those, which is what they mostly are.

    Raises:
        ValueError: other integers.
    """
    if samples.dtype in (numpy.uint8, numpy.uint16):
        return float(numpy.iinfo(samples.dtype).max)
    if numpy.issubdtype(samples.dtype, numpy.floating):
        return 1.0
    low, high = int(samples.min()), int(samples.max())
    if low >= 0 and 255 < high <= 65535:
        return 65535.0
    raise ValueError(
        f"expected samples whose white is known (8 bits, 16 bits, or floating point up to 1), "
        f"got {samples.dtype} from {low} to {high}; write 16 bits first"
    )


def bounded_peak_of(samples: numpy.ndarray) -> float:
    """The number that stands for white, where no sample is brighter or below black.

    Raises:
        ValueError: as :func:`peak_of`; floating point beyond 0 ... 1, or not finite.
    """
    check_finite(samples, "the picture")
    if numpy.issubdtype(samples.dtype, numpy.floating):
        low, high = samples.min(), samples.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected floating-point samples from 0 (black) to 1 (white), got {low:g} to {high:g}")
    return peak_of(samples)


def to_depth(samples: numpy.ndarray, bits: int, peak: float) -> numpy.ndarray:
    """Samples of 8 or 16 bits, white for white; what is brighter becomes white."""
    dtype: Any = {8: numpy.uint8, 16: numpy.uint16}[bits]
    if samples.dtype == dtype:
        return samples
    unit = numpy.clip(samples.astype(numpy.float64) / peak, 0, 1)
    return numpy.floor(unit * numpy.iinfo(dtype).max + 0.5).astype(dtype)


def flatten(samples: numpy.ndarray, colour: tuple[int, int, int]) -> numpy.ndarray:
    """Samples without alpha: the picture before a colour of 8 bits; grey stays grey where the colour is grey."""
    if not has_alpha(samples):
        return samples
    grey = len(set(colour)) == 1
    if samples.shape[2] == 2 and not grey:
        samples = numpy.concatenate([numpy.repeat(samples[..., :1], 3, 2), samples[..., 1:]], 2)
    share = samples[..., -1:].astype(numpy.float64) / alpha_peak(samples.dtype)
    behind = numpy.array(colour[: samples.shape[2] - 1], numpy.float64) / 255 * peak_of(samples)
    flat = samples[..., :-1] * share + behind * (1 - share)
    if numpy.issubdtype(samples.dtype, numpy.integer):
        flat = numpy.floor(flat + 0.5)
    flat = flat.astype(samples.dtype)
    return flat if flat.shape[2] == 3 else flat[..., 0]


def check_finite(samples: numpy.ndarray, what: str) -> None:
    """Raises:
    ValueError: a sample is NaN or infinite, which would be written as black.
    """
    if numpy.issubdtype(samples.dtype, numpy.floating) and not numpy.isfinite(samples).all():
        raise ValueError(f"expected {what} to be finite, got NaN or infinity in {samples.dtype}")
