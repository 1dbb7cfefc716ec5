# SPDX-License-Identifier: Apache-2.0
"""Counter-based dropout masks: recomputed from a seed instead of stored."""

import torch
from torch import Tensor

from fastdense.ops.fakes import register_fake


def dropout_mask(seed: Tensor, layer: int, rows: int, channels: int, drop_rate: float) -> Tensor:
    """Returns a mask of the elements that dropout keeps.

    ``mask[r, c] = word(r * channels + c) >= drop_rate * 2**32`` with
    ``word(i) = Philox4x32-10(key=seed, counter=(i // 4, layer, 0))[i % 4]``: a pure function of its
    arguments, equal on every device, so the backward pass recomputes the mask instead of storing it.

    Args:
        seed: [], int64, on the device of the result. Its 64 bits are the key.
        layer: number in [0, 2**32) that separates the layers sharing a seed.
        rows: number of rows, for instance pixels of a channels-last batch.
        channels: number of channels.
        drop_rate: probability in [0, 1] that an element is dropped. 0 keeps all, 1 keeps none.

    Returns:
        ``[rows, channels]``, bool, contiguous; True where the element is kept.

    Raises:
        TypeError: if ``seed`` is not int64.
        ValueError: if ``seed`` has dimensions, or a number is outside its range.

    Note:
        Deterministic. On CUDA the seed is read by the kernel, so that the host does not wait.

    Reference:
        J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw. Parallel random numbers: as easy as
        1, 2, 3. SC'11, 2011, section 3.3.

    Example:
        >>> seed = torch.tensor(7)
        >>> dropout_mask(seed, layer=0, rows=2, channels=3, drop_rate=0.0)
        tensor([[True, True, True],
                [True, True, True]])
    """
    return torch.ops.fastdense.dropout_mask(seed, layer, rows, channels, drop_rate)


@register_fake("dropout_mask")
def _(seed: Tensor, layer: int, rows: int, channels: int, drop_rate: float) -> Tensor:
    return seed.new_empty((rows, channels), dtype=torch.bool)
