# SPDX-License-Identifier: Apache-2.0
"""What keeps a module from being fused, whatever it computes.

A fused operator does not call the inner modules. What relies on such calls (hooks, replaced sub-modules, methods set on
an instance) raises :class:`NotFusible`, and the caller runs the plain modules instead.
"""

import types
from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# Norms with statistics of each sample.
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SAMPLE_NORMS = (*INSTANCE_NORMS, nn.GroupNorm)


# timm's norms with an activation inside.
_NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# Methods that make the numbers, of torch's modules and of the libraries' blocks and layers.
_METHODS = (
    "forward",
    "_call_impl",
    "_conv_forward",
    "_check_input_dim",
    "features",
    "branch",
    "bn_function",
    "bottleneck_fn",
    "any_requires_grad",
    "call_checkpoint_bottleneck",
)


# What tensors do when they are given to a function: nothing of their own.
_NOT_WATCHING = (vars(torch.Tensor)["__torch_function__"].__func__, torch._C._disabled_torch_function_impl)


class NotFusible(Exception):
    """The reason why a block has to run as plain modules."""


class NotFusibleInTraining(NotFusible):
    """A reason that goes away in eval mode: the block is converted, and runs plainly while it trains."""


# What to do where a model has no fused blocks.
CALL_CONVERT = "call fastdense.convert(model); fastdense.report(model) says what stays plain, and why"


def check_module(op: str, model: object) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        got = f"the name {model!r}; make the model first, e.g. fastdense.models.create({model!r})"
    elif isinstance(model, type):
        got = f"the class {model.__name__}; make the model first, e.g. {model.__name__}(...)"
    else:
        got = type(model).__name__
    raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {got}")


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's code and nothing else."""
    return _intrusion(module) is None


def check_no_hooks(module: nn.Module, name: str) -> None:
    found = _intrusion(module)
    if found is not None:
        raise NotFusible(f"{name} has {found}")


def check_methods(module: nn.Module, name: str, besides: tuple[str, ...] = ()) -> None:
    """Raises NotFusible where an attribute of the instance stands in front of a method of its class."""
    for method in _own_methods(module):
        if method not in besides:
            raise NotFusible(f"{name} has a {method} of its own")


def _intrusion(module: nn.Module) -> str | None:
    state = module.__dict__
    if any(state.get(hooks) for hooks in _HOOKS):
        return "hooks"
    if "parametrizations" in state["_modules"]:
        return "a parametrization"
    methods = _own_methods(module)
    if methods:
        return f"a {methods[0]} of its own"
    if torch.compiler.is_compiling():
        return None
    for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
        if tensor is not None and _watches(type(tensor)):
            return f"a {type(tensor).__name__}, which watches the functions it is given to"
    return None


def _watches(kind: Any) -> bool:
    return getattr(kind.__torch_function__, "__func__", kind.__torch_function__) not in _NOT_WATCHING


def _own_methods(module: nn.Module) -> list[str]:
    state = module.__dict__
    if torch.compiler.is_compiling():  # which guards every name that is asked for
        return [name for name in _METHODS if name in state]
    kind = type(module)
    return [name for name in state if isinstance(getattr(kind, name, None), types.FunctionType | property)]


def forward_of(module: nn.Module) -> Any:
    """The forward of a module's class; None of TorchScript's, whose classes have none to ask for."""
    return None if isinstance(module, torch.jit.ScriptModule) else type(module).forward


def is_known_class(module: nn.Module, known: tuple[tuple[str, str], ...]) -> bool:
    """Whether ``module`` is of a known class, or of a subclass that leaves its methods alone."""
    for base in type(module).__mro__:
        if (base.__module__, base.__qualname__) in known:
            return True
        if any(method in base.__dict__ for method in _METHODS):
            return False
    return False


def check_no_global_hooks() -> None:
    """Those of a ``ModuleTracker`` only note where a module begins and ends: they count operations by module."""
    for hooks in (
        global_hooks._global_forward_hooks,
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_backward_hooks,
        global_hooks._global_backward_pre_hooks,
    ):
        for hook in hooks.values():
            if type(getattr(hook, "__self__", None)).__module__ != "torch.utils.module_tracker":
                raise NotFusible("global module hooks are installed")


def child(module: nn.Module, name: str) -> nn.Module | None:
    return module.__dict__["_modules"].get(name)


def class_name(module: object) -> str:
    """With its package where a class of another has the name of one of torch.nn, as in quantisation."""
    kind = type(module)
    borrowed = getattr(nn, kind.__name__, kind) is not kind
    return f"{kind.__module__}.{kind.__name__}" if borrowed else kind.__name__


def check_conv(
    conv: Any, name: str, kernel: int | None, *, stride: int = 1, grouped: bool = False, bias: bool = False
) -> nn.Conv2d:
    """A convolution, padded by half its kernel; ``kernel`` None: any odd one; ``bias``: whether it may have one."""
    if type(conv) not in CONVS:
        raise NotFusible(f"{name} is a {class_name(conv)}, not a Conv1d, Conv2d or Conv3d")
    check_no_hooks(conv, name)
    kernels = list(conv.weight.shape[2:])
    dims = len(kernels)
    plain = (
        (conv.bias is None or bias)
        and (conv.groups == 1 or grouped)
        and all(s == stride for s in per_axis(conv.stride, dims))
        and all(d == 1 for d in per_axis(conv.dilation, dims))
        and conv.padding_mode == "zeros"
        and all(k % 2 == 1 and (kernel is None or k == kernel) for k in kernels)
        and (
            conv.padding == "same" and stride == 1
            if isinstance(conv.padding, str)
            else per_axis(conv.padding, dims) == [k // 2 for k in kernels]
        )
    )
    if not plain:
        wanted = ("" if bias else "no bias, ") + f"stride {stride}, " + ("" if grouped else "groups 1, ")
        raise NotFusible(f"{name} is {_settings(conv)}: expected {wanted}'same' zero padding")
    return conv


def _settings(conv: Any) -> str:
    """What torch prints, which it cannot where a size is one number."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    values = ", ".join(f"{name}={getattr(conv, name)!r}" for name in names)
    return f"{class_name(conv)}({values}, bias={conv.bias is not None})"


def is_pointwise(conv: Any) -> bool:
    """Whether a convolution is 1x1, by its settings: a parametrized weight may change where it is read."""
    kernel = conv.kernel_size
    return set(kernel if isinstance(kernel, tuple | list) else (kernel,)) == {1}


def per_axis(size: Any, dims: int) -> list[int]:
    """A size of a convolution or pool for each axis: torch takes one number for all of them as well."""
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * dims if len(sizes) == 1 else sizes


def fused_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside of timm's norms that have one."""
    if type(norm).__name__ not in _NORMS_WITH_ACTIVATION or type(child(norm, "drop")) is not nn.Identity:
        return None
    return child(norm, "act")


def has_fused_relu(norm: nn.Module) -> bool:
    """Whether ``norm`` is timm's norm with a plain ReLU inside."""
    return type(fused_activation(norm)) is nn.ReLU


def check_norm(norm: Any, name: str, *, any_activation: bool = False) -> Any:
    """A batch norm whose statistics can be taken, or used, and moved without a call of it.

    It may have a ReLU inside, or with ``any_activation`` any activation.
    """
    known = norm is not None and (
        type(norm) in NORMS or (fused_activation(norm) is not None if any_activation else has_fused_relu(norm))
    )
    if not known:
        wanted = "a BatchNorm, InstanceNorm or GroupNorm" if any_activation else "a BatchNorm with ReLU"
        raise NotFusible(f"{name} is a {class_name(norm)}, not {wanted}")
    check_no_hooks(norm, name)
    for inner in norm.__dict__["_modules"].values():
        check_no_hooks(inner, f"{name}'s activation")
    counter = norm.num_batches_tracked
    if norm.running_mean is not None and (counter is None or counter.dtype is not torch.int64):
        raise NotFusible(f"{name} has running statistics without a num_batches_tracked of type int64")
    if norm.running_mean is None and counter is not None and norm.track_running_stats:
        raise NotFusible(f"{name} has a num_batches_tracked without running statistics")
    _check_eps(norm, name)
    return norm


def _check_eps(norm: Any, name: str) -> None:
    if not norm.eps > 0:
        raise NotFusible(f"{name} has eps {norm.eps}, expected a number above 0")


def check_dense_norm(norm: Any, name: str, *, any_activation: bool = True) -> Any:
    """A norm of a dense block: a batch norm, perhaps with an activation inside, or an instance or group norm."""
    if type(norm) not in SAMPLE_NORMS:
        return check_norm(norm, name, any_activation=any_activation)
    check_no_hooks(norm, name)
    if type(norm) in INSTANCE_NORMS and norm.track_running_stats != (norm.running_mean is not None):
        raise NotFusible(f"{name} has a track_running_stats that does not tell whether it has running statistics")
    _check_eps(norm, name)
    return norm


def check_fits(norm: Any, name: str, channels: int, dims: int) -> None:
    """Raises NotFusible for a norm of other dimensions, which torch refuses, or of other channels than it reads.

    An instance norm without weights runs on any number of channels, with a warning by torch.
    """
    for own, kinds in enumerate(zip(NORMS[:3], INSTANCE_NORMS, strict=True), 1):
        if isinstance(norm, kinds) and own != dims:
            raise NotFusible(f"{name} is a {class_name(norm)} in front of a convolution of {dims} dimensions")
    if type(norm) in INSTANCE_NORMS and norm.num_features != channels:
        raise NotFusible(f"{name} has num_features {norm.num_features}, and reads {channels} channels")


def check_norm_relu(module: nn.Module, norm: str, relu: str, where: str) -> Any:
    """A batch norm followed by ReLU: two modules, or one that does both."""
    found = check_norm(child(module, norm), f"{where}{norm}")
    activation = child(module, relu)
    if has_fused_relu(found) == (activation is not None):
        raise NotFusible(f"{where}{norm} is not followed by one ReLU")
    if activation is not None:
        if type(activation) is not nn.ReLU:
            raise NotFusible(f"{where}{relu} is a {type(activation).__name__}, not a ReLU")
        check_no_hooks(activation, f"{where}{relu}")
    return found
