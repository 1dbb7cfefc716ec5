# SPDX-License-Identifier: Apache-2.0
"""Norms before a max pool, recomputed in the backward pass.

A max pool does not commute with a 1x1 convolution, so that a transition with one cannot join the operator of its block.
Plain modules save the normalised block, the output of the convolution, a mask and the indices of the pool: more than
the block. So does a stem whose max pool :func:`fastdense.ops.norm_relu_max_pool` does not support. Here only the input
is saved for backward, and the modules run again there. Results are bit-identical.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdense.fusion.checks import (
    SAMPLE_NORMS,
    NotFusible,
    check_conv,
    check_no_global_hooks,
    check_no_hooks,
    class_name,
    has_fused_relu,
    is_pointwise,
)
from fastdense.fusion.dense_layers import is_activation
from fastdense.ops.flops import uncounted

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


_DROPOUTS: dict[type, Callable[..., Tensor]] = {
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
}


def looks_like_max_pool_transition(modules: Sequence[nn.Module]) -> bool:
    """Whether these are a norm, an activation, 1x1 convolution, perhaps dropout, and max pool."""
    if len(modules) not in (4, 5) or not isinstance(modules[0], (nn.modules.batchnorm._BatchNorm, *SAMPLE_NORMS)):
        return False
    kinds = [_CONVS, *[tuple(_DROPOUTS)] * (len(modules) - 4), POOLS]
    if not (isinstance(modules[1], nn.ReLU) or is_activation(modules[1])):
        return False
    return all(isinstance(m, k) for m, k in zip(modules[2:], kinds, strict=True)) and is_pointwise(modules[2])


def read_max_pool_transition(module: nn.Module) -> list[Any]:
    """The modules, if nobody watches them."""
    modules = list(module.children())
    if not looks_like_max_pool_transition(modules):
        raise NotFusible("its modules are not norm, activation, 1x1 convolution, optional dropout, max pool")
    check_conv(modules[2], "conv", 1, bias=True)
    check_unobserved(modules)
    if not is_recomputable(modules[0]):
        raise NotFusible(
            f"norm is a {class_name(modules[0])}: expected a BatchNorm that is not shared by processes, or a norm of "
            "single samples without running statistics"
        )
    return modules


def check_unobserved(modules: Sequence[Any]) -> None:
    """Raises NotFusible where somebody would see that the modules are run twice, or not at all."""
    check_no_global_hooks()
    for index, module in enumerate(modules):
        for inner in module.modules():
            check_no_hooks(inner, f"module {index}")


def is_recomputable(norm: Any) -> bool:
    """Whether ``norm`` takes the statistics of its own process alone, so that it can be run again."""
    return type(norm) in _NORMS or _moves_nothing(norm) or (has_fused_relu(norm) and isinstance(norm, _NORMS))


def _moves_nothing(norm: Any) -> bool:
    """Whether a norm of single samples has no running statistics."""
    return type(norm) in SAMPLE_NORMS and getattr(norm, "running_mean", None) is None


def run_recomputed(modules: Sequence[Any], input: Tensor) -> Tensor:
    """Runs modules that begin with a norm; keeps their input for the backward pass, which runs them again."""
    compiled = torch.compiler.is_compiling()  # the compiler chooses what to keep
    if compiled or not torch.is_grad_enabled() or not is_recomputable(modules[0]):
        for module in modules:
            input = module(input)
        return input
    run, draws = _runner(modules)
    return checkpoint(run, input, use_reentrant=False, preserve_rng_state=draws)


def _runner(modules: Sequence[Any]) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Runs the modules in their mode of now; running statistics move in the forward pass only. And whether it draws."""
    norm, *others = modules
    drop_rates = [other.p if type(other) in _DROPOUTS and other.training else 0.0 for other in others]
    again = _norm_of_backward(norm)

    def run(input: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:
            return behind(norm(input))
        with uncounted():
            return behind(again(input))

    def behind(x: Tensor) -> Tensor:
        for other, drop_rate in zip(others, drop_rates, strict=True):
            if type(other) not in _DROPOUTS:
                x = other(x)
            elif drop_rate > 0:
                x = _DROPOUTS[type(other)](x, drop_rate, True)
        return x

    return run, any(drop_rates)


def _norm_of_backward(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm in its mode of now, without moving its running statistics."""
    if _moves_nothing(norm):
        return norm
    mean, var = norm.running_mean, norm.running_var
    uses_batch = norm.training or mean is None
    if norm.training and not norm.track_running_stats:
        mean = var = None
    if mean is not None:  # in training, their numbers do not matter
        mean, var = mean.clone(), var.clone()

    def again(input: Tensor) -> Tensor:
        x = F.batch_norm(input, mean, var, norm.weight, norm.bias, uses_batch, 0.0, norm.eps)
        return F.relu(x, inplace=True) if has_fused_relu(norm) else x

    return again
