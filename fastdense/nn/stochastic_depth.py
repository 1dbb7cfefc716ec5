# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: residual branches that training leaves out at random."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MODES = ("batch", "sample")
SCALES = ("test", "train")


def check_probability(op: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: expected {name} to be a probability in [0, 1], got {value!r}")


def check_choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: expected {name} to be one of {known}, got {value!r}")


def linear_decay(num_blocks: int, last: float = 0.5) -> list[float]:
    """Survival probabilities ``p_l = 1 - l / L * (1 - last)`` of blocks ``l = 1 ... L``.

    Args:
        num_blocks: number of residual blocks ``L``.
        last: survival probability of the last block, in [0, 1].

    Raises:
        ValueError: if ``num_blocks`` is not positive or ``last`` is no probability.

    Reference:
        G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger. Deep Networks with Stochastic Depth. ECCV 2016,
        arXiv:1603.09382, equation 4.

    Example:
        >>> linear_decay(4)
        [0.875, 0.75, 0.625, 0.5]
    """
    if num_blocks < 1:
        raise ValueError(f"linear_decay: expected num_blocks to be positive, got {num_blocks!r}")
    check_probability("linear_decay", "last", last)
    return [1 - block / num_blocks * (1 - last) for block in range(1, num_blocks + 1)]


class StochasticDepth(nn.Module):
    """Adds a residual branch to its shortcut, or leaves it out: ``shortcut + b * branch(x)``.

    In training ``b`` is 1 with probability ``p = survival``, else 0. The expected sum is the same in training and in
    evaluation; ``scale`` says which of the two has the factor:

    ===========  ====================  ==================
    ``scale``    training              evaluation
    ===========  ====================  ==================
    ``"test"``   ``b * branch(x)``     ``p * branch(x)``
    ``"train"``  ``b/p * branch(x)``   ``branch(x)``
    ===========  ====================  ==================

    The published method is ``mode="batch", scale="test"``; torchvision's ``"batch"`` and ``"row"`` and timm's
    ``DropPath`` are ``scale="train"`` with ``mode="batch"``, ``"sample"`` and ``"sample"``.

    Args:
        survival: probability ``p`` in [0, 1] that the branch is computed.
        mode: "batch" draws one ``b`` for the mini-batch; a branch left out is not called, so its norms keep their
            statistics and nothing is kept for backward. "sample" draws one ``b`` for each sample and computes
            the branch for all of them.
        scale: "test" or "train", see above.

    Shape:
        ``forward(branch, x, shortcut)`` maps ``[N, ...]`` to the shape of ``shortcut``, which ``branch(x)`` has too.

    Raises:
        ValueError: if ``survival`` is no probability, or ``mode`` or ``scale`` is unknown.

    Note:
        ``b`` comes from torch's CPU generator: a seed fixes it, and no device is waited for. "batch" mode decides in
        Python, so ``torch.compile(fullgraph=True)`` takes it in evaluation only. The parameters of a branch left out
        get no gradient at all (None), so optimisers leave them alone; the authors' code applied weight decay and
        momentum to them as to zero gradients, which ``zero_grad(set_to_none=False)`` restores. This module has no
        parameters, so a network's ``state_dict`` is the same with and without it.

    Reference:
        G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger. Deep Networks with Stochastic Depth. ECCV 2016,
        arXiv:1603.09382, equations 2 and 5.

    Example:
        >>> drop = StochasticDepth(0.25).eval()
        >>> drop(torch.square, torch.tensor([2.0]), torch.tensor([1.0]))
        tensor([2.])
    """

    def __init__(self, survival: float, mode: str = "batch", scale: str = "test") -> None:
        super().__init__()
        check_probability("StochasticDepth", "survival", survival)
        check_choice("StochasticDepth", "mode", mode, MODES)
        check_choice("StochasticDepth", "scale", scale, SCALES)
        self.survival = float(survival)
        self.mode = mode
        self.scale = scale

    def forward(self, branch: Callable[[Tensor], Tensor], x: Tensor, shortcut: Tensor) -> Tensor:
        p = self.survival
        if p == 1:
            return shortcut + branch(x)
        if not self.training:
            return shortcut + (branch(x) if self.scale == "train" else p * branch(x))
        factor = 1 / p if self.scale == "train" and p > 0 else 1.0
        if self.mode == "batch":
            if torch.rand((), device="cpu").item() >= p:
                return shortcut
            return shortcut + (branch(x) if factor == 1 else factor * branch(x))
        y = branch(x)
        keep = torch.rand((x.shape[0],), device="cpu") < p
        factors = (factor * keep).to(y).view(-1, *(1,) * (y.dim() - 1))
        return shortcut + factors * y

    def extra_repr(self) -> str:
        return f"survival={self.survival:g}, mode={self.mode!r}, scale={self.scale!r}"
