# SPDX-License-Identifier: Apache-2.0
"""Inputs that are more than tensors: classes that wrap results, distributed tensors, transforms of torch.func."""

import warnings

import pytest
import torch
import torch.distributed as dist
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors

from tests.cases.converted import assert_same, fastdense_warnings
from tests.cases.families import FAMILIES, pair

AFFINE = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))


class Named(Tensor):
    """Hands its name on, as classes that wrap results do."""

    name = ""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        made = super().__torch_function__(func, types, args, kwargs)
        if isinstance(made, Named):
            leaves = tree_leaves((args, kwargs))
            made.name = max((t.name for t in leaves if isinstance(t, Named)), default="")
        return made


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Of what a training step saves for backward, parameters aside."""
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    del out
    return sum(count for at, (count, _) in seen.items() if at not in own)


def everything(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step, as plain tensors."""
    out = net(x)
    flat = out.as_tensor() if isinstance(out, MetaTensor) else out.as_subclass(Tensor)
    grads = torch.autograd.grad(
        flat, list(net.parameters()), torch.linspace(-1, 1, flat.numel()).view_as(flat).double()
    )
    made = {"out": flat.detach()} | {
        f"grad {name}": g.as_subclass(Tensor) for (name, _), g in zip(net.named_parameters(), grads, strict=True)
    }
    return made | {f"buffer {name}": b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_meta_tensors_of_monai(name, training):
    plain, fast, x = pair(name, "balanced")
    given = MetaTensor(x, affine=AFFINE, meta={"filename_or_obj": "a.nii"})
    for net in (plain, fast):
        net.train(training)
    with fastdense_warnings() as messages:
        made, expected = fast(given), plain(given)
        assert type(made) is type(expected) is MetaTensor
        assert made.meta == expected.meta and torch.equal(made.affine, expected.affine)
        assert_same(everything(fast, given), everything(plain, given))
        assert saved_bytes(fast, given) == saved_bytes(fast, x)
    assert messages == []


@pytest.mark.parametrize("name", FAMILIES)
def test_tv_tensors_and_others(name):
    plain, fast, x = pair(name, "balanced")
    named = x.as_subclass(Named)
    named.name = "picture"
    with fastdense_warnings() as messages:
        for given in (tv_tensors.Image(x), named, nn.Parameter(x)):
            made, expected = fast(given), plain(given)
            assert type(made) is type(expected)
            assert_same(everything(fast, given), everything(plain, given))
        with tv_tensors.set_return_type("TVTensor"):
            assert type(fast(tv_tensors.Image(x))) is type(plain(tv_tensors.Image(x)))
        assert fast(named).name == plain(named).name == "picture"
    assert messages == []


def test_distributed_tensors_run_plainly(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, fast, x = pair("residual dense block", "balanced")
        mesh = init_device_mesh("cpu", (1,))
        made = []
        for net in (plain, fast):
            for module in net.modules():
                for key, p in module.named_parameters(recurse=False):
                    module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh)))
            with fastdense_warnings() as messages:
                made.append(net(distribute_tensor(x, mesh)))
        assert all(isinstance(out, DTensor) for out in made)
        torch.testing.assert_close(made[1].full_tensor(), made[0].full_tensor(), rtol=1e-12, atol=1e-12)
        assert len(messages) == 1 and "DTensor" in messages[0]
    finally:
        dist.destroy_process_group()


# --- transforms of torch.func, which fall back ------------------------------------------------------------------------


def frozen_pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    plain, fast, x = pair(name, "balanced")
    return plain.eval(), fast.eval(), x


def compare(run, plain: nn.Module, fast: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever torch says of its transforms
        made, expected = run(fast), run(plain)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def scalar(net: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(net, parameters, (x,)).square().mean()


BLOCKS = [
    "dense block and transition",
    "hand-written block",
    "residual dense block",
    "torchvision",
    "dual path network",
]


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_products(name):
    plain, fast, x = frozen_pair(name)
    compare(lambda net: grad(lambda p: scalar(net, p, x))(parameters_of(net)), plain, fast)
    compare(lambda net: vjp(net, x)[1](torch.ones_like(net(x)))[0], plain, fast)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_each_sample(name):
    plain, fast, x = frozen_pair(name)
    each = vmap(lambda net, p, x: grad(lambda p: scalar(net, p, x[None]))(p), in_dims=(None, None, 0))
    compare(lambda net: each(net, parameters_of(net), x), plain, fast)


@pytest.mark.parametrize("name", [*BLOCKS, "timm"])
def test_samples_without_gradients(name):
    plain, fast, x = frozen_pair(name)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            compare(lambda net: vmap(net)(x[:, None]), plain, fast)


@pytest.mark.parametrize("name", BLOCKS[:3])
def test_ensembles_and_jacobians(name):
    plain, fast, x = frozen_pair(name)

    def ensemble(net: nn.Module) -> Tensor:
        parameters, buffers = stack_module_state([net, net])
        return vmap(lambda p, b: functional_call(net, (p, b), (x,)))(parameters, buffers)

    compare(ensemble, plain, fast)
    compare(lambda net: jacrev(lambda x: net(x).mean((2, 3)))(x[:1, :, :4, :4]), plain, fast)


def test_the_reason_is_said_and_the_module_is_fused_again():
    _, fast, x = frozen_pair("dense block")
    with fastdense_warnings() as messages:
        vmap(lambda x: fast(x[None]))(x)
        fast(x)
    assert len(messages) == 1 and "forward-mode derivatives and function transforms" in messages[0]


# --- batches of gradients, which stay fused ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("RRDBNet", "FC-DenseNet")])
def test_batches_of_gradients(name, training):
    plain, fast, x = pair(name, "balanced")
    x.requires_grad_()
    made = []
    for net in (plain, fast):
        net.train(training)
        with fastdense_warnings() as messages:
            out = net(x)
            grads = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
            inputs = [x, *net.parameters()]
            made.append(torch.autograd.grad(out, inputs, grads, is_grads_batched=True))
        assert messages == []
    for g, expected, parameter in zip(*made, inputs, strict=True):
        assert g.shape == (3, *parameter.shape)
        torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["dense block", "residual dense block"])
def test_jacobian_by_batches(name):
    _, fast, x = frozen_pair(name)
    small = x[:1, :, :3, :3]

    def run(x: Tensor) -> Tensor:
        return fast(x).mean((2, 3))

    made = torch.autograd.functional.jacobian(run, small, vectorize=True)
    torch.testing.assert_close(made, torch.autograd.functional.jacobian(run, small), rtol=1e-10, atol=1e-12)
