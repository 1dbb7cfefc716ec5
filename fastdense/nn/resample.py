# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling as modules."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastdense.ops.bicubic import bicubic_resize


class BicubicResize(nn.Module):
    """Resamples the spatial axes; arguments are those of :func:`fastdense.bicubic_resize`.

    Shape:
        ``[N, C, spatial]`` to ``[N, C, size]``.

    Example:
        >>> BicubicResize((4, 5), preset="matlab")(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 5])
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if (size is None) == (scale_factor is None):
            raise ValueError(
                f"{type(self).__name__}: expected either size or scale_factor to be given, "
                f"got {size} and {scale_factor}"
            )
        self.size, self.scale_factor, self.options = size, scale_factor, options

    def forward(self, x: Tensor) -> Tensor:
        return bicubic_resize(x, self.size, self.scale_factor, **self.options)

    def extra_repr(self) -> str:
        target = f"size={self.size}" if self.size is not None else f"scale_factor={self.scale_factor}"
        return ", ".join([target, *(f"{name}={value!r}" for name, value in self.options.items())])


class BicubicUpsample(BicubicResize):
    """Enlarges by a factor, as ``nn.Upsample(scale_factor, mode="bicubic")`` does.

    Args:
        scale_factor: one number or one an axis.
        **options: of :func:`fastdense.bicubic_resize`.

    Example:
        >>> BicubicUpsample(2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(self, scale_factor: float | Sequence[float], **options: Any) -> None:
        super().__init__(None, scale_factor, **options)
