# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: residual branches that are dropped at random in training."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdense._choices import SURVIVAL_MODES, SURVIVAL_SCALES, SurvivalMode, SurvivalScale


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


def survivals(op: str, num_layers: int, survival: float | Sequence[float]) -> list[float]:
    """One survival probability for each layer: those given, or the linear decay to the one given."""
    if not isinstance(survival, Sequence):
        check_probability(op, "survival", survival)
        return linear_decay(num_layers, survival)
    if len(survival) != num_layers:
        raise ValueError(f"{op}: expected survival to have {num_layers} entries, got {len(survival)}")
    return [float(p) for p in survival]


class StochasticDepth(nn.Module):
    """Adds a residual branch to its shortcut, or drops it: ``shortcut + b * branch(x)``.

    In training ``b`` is 1 with probability ``p = survival``, else 0. The expected sum is the same in training and in
    evaluation; ``scale`` says which of the two has the factor:

    | ``scale`` | training | evaluation |
    | --- | --- | --- |
    | ``"test"`` | ``b * branch(x)`` | ``p * branch(x)`` |
    | ``"train"`` | ``b/p * branch(x)`` | ``branch(x)`` |

    The published method is ``mode="batch", scale="test"``; torchvision's ``"batch"`` and ``"row"`` and timm's
    ``DropPath`` are ``scale="train"`` with ``mode="batch"``, ``"sample"`` and ``"sample"``.

    Args:
        survival: probability ``p`` in [0, 1] that the branch is computed.
        mode: "batch" draws one ``b`` for the mini-batch. A dropped branch is not called, so its running statistics do
            not change and nothing is saved for backward. "sample" draws one ``b`` for each sample and computes the
            branch for all of them.
        scale: "test" or "train", see above.

    Shape:
        ``forward(branch, x, shortcut)`` maps ``[N, ...]`` to the shape of ``shortcut``, which ``branch(x)`` has too.

    Raises:
        ValueError: if ``survival`` is no probability, or ``mode`` or ``scale`` is unknown.

    Note:
        ``b`` comes from torch's CPU generator: a seed fixes it, and no device is synchronised. The parameters of a
        dropped branch get no gradient (None), so optimizers skip them. The authors' code applied weight decay and
        momentum to them, as to zero gradients; ``zero_grad(set_to_none=False)`` does the same. This module has no
        parameters, so a network's ``state_dict`` is the same with and without it.

        Under ``torch.compile`` one graph serves every draw. In "batch" mode all branches are computed there, and
        dropped ones are multiplied by 0. Results and running statistics are the same. Time and memory are those of the
        whole network, and the gradients are zeros instead of None.

    Reference:
        G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger. Deep Networks with Stochastic Depth. ECCV 2016,
        arXiv:1603.09382, equations 2 and 5.

    Example:
        >>> drop = StochasticDepth(0.25).eval()
        >>> drop(torch.square, torch.tensor([2.0]), torch.tensor([1.0]))
        tensor([2.])
    """

    def __init__(self, survival: float, mode: SurvivalMode = "batch", scale: SurvivalScale = "test") -> None:
        super().__init__()
        check_probability("StochasticDepth", "survival", survival)
        check_choice("StochasticDepth", "mode", mode, SURVIVAL_MODES)
        check_choice("StochasticDepth", "scale", scale, SURVIVAL_SCALES)
        self.survival = float(survival)
        self.mode = mode
        self.scale = scale

    def forward(self, branch: Callable[[Tensor], Tensor], x: Tensor, shortcut: Tensor) -> Tensor:
        p = self.survival
        if p == 1:
            return shortcut + branch(x)
        if self.draws_samples:
            y = branch(x)
            keep = torch.rand((x.shape[0],), device="cpu") < p
            factors = (self._kept_factor() * keep).to(y).view(-1, *(1,) * (y.dim() - 1))
            return shortcut + factors * y
        factor = self.draw()
        if isinstance(factor, Tensor):
            with statistics_move_if(factor != 0, _norms_of(branch)):
                return shortcut + factor.to(shortcut) * branch(x)
        if factor == 0:
            return shortcut
        return shortcut + (branch(x) if factor == 1 else factor * branch(x))

    @property
    def draws_samples(self) -> bool:
        """Whether every sample has a factor of its own now."""
        return self.mode == "sample" and self.training and self.survival < 1

    def draw(self) -> float | Tensor:
        """The factor of the branch for one mini-batch, 0 where it is left out; drawn in training, in "batch" mode.

        A number, or under ``torch.compile`` a float32 tensor ``[]`` on the CPU.
        """
        p = self.survival
        if p == 1:
            return 1.0
        if not self.training:
            return 1.0 if self.scale == "train" else p
        draw = torch.rand((), device="cpu")
        if torch.compiler.is_compiling():
            return (draw < p) * self._kept_factor()
        return self._kept_factor() if draw.item() < p else 0.0

    def _kept_factor(self) -> float:
        return 1 / self.survival if self.scale == "train" and self.survival > 0 else 1.0

    def extra_repr(self) -> str:
        return f"survival={self.survival:g}, mode={self.mode!r}, scale={self.scale!r}"


def _norms_of(branch: Any) -> list[nn.Module]:
    """The norms with running statistics of a module, or of the module whose method a branch is."""
    owner = branch.__self__ if inspect.ismethod(branch) else branch
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    return [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextlib.contextmanager
def statistics_move_if(moves: Tensor, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, the running statistics of norms change only where ``moves``, a bool tensor ``[]``, is true."""
    held = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in held:
        setattr(norm, name, buffer.clone())  # which the norm moves, and may save for backward
    yield
    with torch.no_grad():
        for norm, name, buffer in held:
            buffer.copy_(torch.where(moves.to(buffer.device), getattr(norm, name), buffer))
            setattr(norm, name, buffer)
