# SPDX-License-Identifier: Apache-2.0
"""The general form of residual, dense and dual path networks: a recurrence of higher order."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdense.fusion.checks import has_no_hooks
from fastdense.plain.stochastic_depth import check_choice

SHARING = ("none", "source", "lag", "dual")

_CONV: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class _Product(NamedTuple):
    """A module as what comes in front of its last convolution or linear layer, and that layer."""

    before: Sequence[nn.Module]
    layer: Any


def _split(module: nn.Module) -> _Product | None:
    """None where ``module`` does not end in a layer that may be joined with others."""
    before: Sequence[nn.Module] = ()
    layer: Any = module
    if type(module) is nn.Sequential and len(module) and has_no_hooks(module):
        *before, layer = module
    if not has_no_hooks(layer):
        return None
    if type(layer) is nn.Linear:
        return _Product(before, layer)
    if type(layer) in _CONV and layer.groups == 1 and layer.padding_mode == "zeros":
        return _Product(before, layer)
    return None


def _geometry(layer: Any) -> tuple[Any, ...]:
    """What two layers must share for one product to replace both."""
    if type(layer) is nn.Linear:
        return nn.Linear, layer.out_features
    return type(layer), layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _one_product(modules: Sequence[nn.Module], states: Sequence[Tensor]) -> Tensor | None:
    """``sum f_t(h^t)`` as one product over concatenated inputs, or None where the modules do not allow it."""
    products = [p for p in map(_split, modules) if p is not None]
    if len(products) < len(modules) or len({_geometry(p.layer) for p in products}) > 1:
        return None
    layers = [p.layer for p in products]
    linear = type(layers[0]) is nn.Linear
    channels = -1 if linear else 1
    inputs = [reduce(lambda x, m: m(x), p.before, h) for p, h in zip(products, states, strict=True)]
    weight = torch.cat([layer.weight for layer in layers], 1)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = reduce(add, biases) if biases else None
    x = torch.cat(inputs, channels)
    if linear:
        return F.linear(x, weight, bias)
    first = layers[0]
    return _CONV[type(first)](x, weight, bias, first.stride, first.padding, first.dilation)


class HigherOrderNet(nn.Module):
    """Every state is made of all earlier ones: ``h^k = g^k(sum of f_t^k(h^t) over t = 0 ... k - 1)``.

    | sharing | modules ``f`` of ``K`` steps | is then |
    | --- | --- | --- |
    | "none" | ``K (K + 1) / 2`` | a dense block: ``f`` the slices of the first 1x1, ``g`` the rest |
    | "source" | ``K``: ``f_t^k = f_t`` | a residual network, ``r^k = r^{k-1} + f_{k-1}(g^{k-1}(r^{k-1}))`` |
    | "lag" | ``order``: depends on ``k-t`` | a recurrent network of that order; of order 1, a plain recursion |
    | "dual" | ``K (K + 1) / 2``, and ``v`` | a dual path network |

    "dual" has a dense path of unshared ``f_t^k`` and a residual path of shared ``v_t``:
    ``h^k = g^k(sum of f_t^k(h^t) + w^k(y^k))`` with ``y^k = sum of v_t(h^t)``, all over ``t = 0 ... k - 1``.

    Args:
        f: makes a module of ``(k, t)``, or one module that stands for all. With "source" it is asked for
            ``(t + 1, t)``, with "lag" for ``(lag, 0)``, once each.
        g: makes a module of ``k = 1 ... K``, or one module for all steps.
        steps: number of steps ``K``.
        sharing: "none", "source", "lag" or "dual".
        order: number of lags with "lag"; None for all.
        v: with "dual", makes a module of ``t``, or is one module for all.
        w: with "dual", makes a module of ``k`` through which the residual path enters; None for the identity.
        fast: whether :meth:`forward` uses running sums and joined products instead of the sums above.

    Shape:
        As the modules give it: all ``f_t^k(h^t)`` of one ``k`` have one shape.

    Raises:
        ValueError: if ``steps`` or ``order`` is not positive, ``sharing`` is unknown, or ``order``, ``v`` or ``w``
            does not belong to it.

    Note:
        The fast path keeps the residual path as a running sum, so that each ``f_t`` or ``v_t`` is called once
        instead of ``K - t`` times. Where all ``f_t^k`` of one ``k`` end in the same kind of convolution or linear
        layer, it concatenates what goes into these and multiplies once. Anything else is called as it is.
        :meth:`reference` calls every module of the sum; norms with running statistics that are shared are then
        updated more often.

    Reference:
        Y. Chen, J. Li, H. Xiao, X. Jin, S. Yan, J. Feng. Dual Path Networks. NIPS 2017, arXiv:1707.01629,
        equations 1 to 8.

    Example:
        >>> fibonacci = HigherOrderNet(torch.nn.Identity(), torch.nn.Identity(), steps=10, sharing="lag", order=2)
        >>> [int(h) for h in fibonacci.states(torch.tensor(1))]
        [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    """

    def __init__(
        self,
        f: Callable[[int, int], nn.Module] | nn.Module,
        g: Callable[[int], nn.Module] | nn.Module,
        steps: int,
        sharing: str = "none",
        *,
        order: int | None = None,
        v: Callable[[int], nn.Module] | nn.Module | None = None,
        w: Callable[[int], nn.Module] | nn.Module | None = None,
        fast: bool = True,
    ) -> None:
        super().__init__()
        check_choice("HigherOrderNet", "sharing", sharing, SHARING)
        if steps < 1:
            raise ValueError(f"HigherOrderNet: expected steps to be positive, got {steps!r}")
        if order is not None and (sharing != "lag" or order < 1):
            raise ValueError(f"HigherOrderNet: expected order to be positive and sharing to be 'lag', got {order!r}")
        if (v is not None) != (sharing == "dual"):
            raise ValueError(f"HigherOrderNet: expected v to be given with sharing 'dual' only, got {v!r}")
        if w is not None and sharing != "dual":
            raise ValueError(f"HigherOrderNet: expected w to be given with sharing 'dual' only, got {w!r}")
        self.steps = steps
        self.sharing = sharing
        self.order = min(order or steps, steps)
        self.fast = fast
        self.f = _modules(f, self._keys())
        self.g = _modules(g, ((k,) for k in range(1, steps + 1)))
        self.v = _modules(v, ((t,) for t in range(steps))) if v is not None else None
        self.w = _modules(w, ((k,) for k in range(1, steps + 1))) if w is not None else None

    def _keys(self) -> Iterable[tuple[int, int]]:
        """Which ``(k, t)`` have a module of their own."""
        if self.sharing == "source":
            return ((t + 1, t) for t in range(self.steps))
        if self.sharing == "lag":
            return ((lag, 0) for lag in range(1, self.order + 1))
        return ((k, t) for k in range(1, self.steps + 1) for t in range(k))

    def function(self, k: int, t: int) -> nn.Module:
        """The module ``f_t^k``."""
        key = {"source": (t + 1, t), "lag": (k - t, 0)}.get(self.sharing, (k, t))
        return self.f[_name(key)]

    def _sources(self, k: int) -> range:
        return range(max(0, k - self.order), k) if self.sharing == "lag" else range(k)

    def _enter(self, k: int, y: Tensor) -> Tensor:
        return self.w[_name((k,))](y) if self.w is not None else y

    def _dense_sum(self, k: int, states: Sequence[Tensor], fast: bool) -> Tensor:
        """``sum of f_t^k(h^t)``"""
        modules = [self.function(k, t) for t in self._sources(k)]
        sources = [states[t] for t in self._sources(k)]
        if fast and len(modules) > 1:
            joined = _one_product(modules, sources)
            if joined is not None:
                return joined
        return reduce(add, (module(h) for module, h in zip(modules, sources, strict=True)))

    def states(self, x: Tensor) -> list[Tensor]:
        """All states ``h^0 = x, h^1, ..., h^K``."""
        if not self.fast:
            return self.reference(x)
        states = [x]
        running: Tensor | None = None
        for k in range(1, self.steps + 1):
            shared = self.f if self.sharing == "source" else self.v
            if shared is not None:
                name = _name((k, k - 1) if self.sharing == "source" else (k - 1,))
                new = shared[name](states[-1])
                running = new if running is None else running + new
            if self.sharing == "source":
                assert running is not None
                r = running
            else:
                r = self._dense_sum(k, states, True)
                if running is not None:
                    r = r + self._enter(k, running)
            states.append(self.g[_name((k,))](r))
        return states

    def reference(self, x: Tensor) -> list[Tensor]:
        """All states, by the sums of the definition."""
        states = [x]
        for k in range(1, self.steps + 1):
            r = self._dense_sum(k, states, False)
            if self.v is not None:
                r = r + self._enter(k, reduce(add, (self.v[_name((t,))](states[t]) for t in range(k))))
            states.append(self.g[_name((k,))](r))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """The last state ``h^K``."""
        return self.states(x)[-1]

    def extra_repr(self) -> str:
        return f"steps={self.steps}, sharing={self.sharing!r}, order={self.order}"


def _name(key: Sequence[int]) -> str:
    return "_".join(map(str, key))


def _modules(make: Callable[..., nn.Module] | nn.Module, keys: Iterable[Sequence[int]]) -> nn.ModuleDict:
    return nn.ModuleDict({_name(key): make if isinstance(make, nn.Module) else make(*key) for key in keys})
