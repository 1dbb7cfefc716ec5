# SPDX-License-Identifier: Apache-2.0
"""Networks of libraries that keep dense, dual path or residual dense blocks of their own."""

import warnings

import pytest
import segmentation_models_pytorch as smp
import spandrel
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdense
from fastdense.fusion.base import FusedModule
from fastdense.fusion.checks import NotFusible
from tests.cases.converted import assert_bit_equal, assert_same, images, pair, randomise, step

DUAL_PATH = "encoder.features.conv3_2"


def unet(encoder: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = smp.Unet(encoder, encoder_depth=4, encoder_weights=None, decoder_channels=(16, 8, 8, 8))
    return randomise(net.double())


class StageCalls(TorchDispatchMode):
    """Counts operator calls of dual path stages."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.fastdense.dual_path_stage.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("encoder", "memory"),
    [("densenet121", "balanced"), ("dpn68", "balanced"), ("dpn68", "reversible"), ("dpn68b", "min")],
)
def test_segmentation_models(encoder, memory):
    plain, fast = pair(unet, memory, encoder=encoder)
    x = images(2, 96)
    assert_same(step(fast, x), step(plain, x))
    assert all(row.runs == "fused" for row in fastdense.report(fast, (3, 64, 64)).rows)
    with torch.no_grad():
        assert torch.allclose(fast.eval()(x), plain.eval()(x), rtol=0, atol=1e-9)
    fast.load_state_dict(plain.state_dict())
    assert_bit_equal(step(fastdense.restore(fast), x), step(plain, x))


def test_slices_of_a_sequence_run_as_stages():
    """The encoder runs its features by slices; the residual and the dense path are tensors of their own in between."""
    _, fast = pair(unet, encoder="dpn68")
    with StageCalls() as calls:
        fast(images(2, 64))
    assert calls.count == 3


def test_a_row_of_stages_hands_on_the_last_pair():
    names = ("conv2_3", "conv3_1", "conv3_2")
    x = torch.randn(2, 128, 8, 8, dtype=torch.float64)
    made = []
    for net in pair(unet, encoder="dpn68"):
        row = type(net.encoder.features)(*[net.get_submodule(f"encoder.features.{name}") for name in names])
        made.append(row((x[:, :64], x[:, 64:])))
    for plain, fast in zip(*made, strict=True):
        assert torch.allclose(fast, plain, rtol=0, atol=1e-9)


def test_a_hook_of_a_block_gets_its_pair():
    x = images(2, 64)
    found: list[tuple[Tensor, ...]] = []
    for net in pair(unet, encoder="dpn68"):
        handle = net.get_submodule(DUAL_PATH).register_forward_hook(lambda m, args, out: found.append((*args[0], *out)))
        net(x)
        handle.remove()
    plain, fast = found
    assert len(fast) == 4
    for actual, expected in zip(fast, plain, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-9)


def test_a_plain_block_between_fused_ones():
    plain, fast = pair(unet, encoder="dpn68b")
    for net in (plain, fast):
        net.get_submodule(DUAL_PATH).c1x1_a.register_forward_hook(lambda *_: None)
    x = images(2, 96)
    with pytest.warns(UserWarning, match=f"{DUAL_PATH} runs as plain modules: c1x1_a has hooks"):
        assert_same(step(fast, x), step(plain, x))


def test_what_stands_in_the_way_of_a_later_stage_is_found_before_the_first_has_run(monkeypatch):
    """Else the first would run again by its modules, and its running statistics would move twice."""
    plain, fast = pair(timm.create_model, model_name="dpn68")
    last = fast.features.conv5_3.c3x3_b.bn

    def refuse(norms):
        if any(norm is last for norm in norms):
            raise NotFusible("its norms belong to different process groups")

    monkeypatch.setattr(fastdense.fusion.dual_path, "process_group_of", refuse)
    x = torch.randn(2, 3, 64, 64)
    fast(x)
    plain(x)
    moved = [name for name, b in fast.named_buffers() if name.endswith("num_batches_tracked") and b != 1]
    assert moved == []


def test_spandrel():
    """Which makes a network from a checkpoint alone."""
    torch.manual_seed(0)
    weights = fastdense.models.RRDBNet(4, blocks=2, width=16).state_dict()
    plain, fast = (spandrel.ModelLoader().load_from_state_dict(dict(weights)).model.double() for _ in range(2))
    fastdense.convert(fast)
    assert sum(isinstance(module, FusedModule) for module in fast.modules()) == 6
    for net in (plain, fast):
        net.train()
        net.requires_grad_(True)
    x = images(1, 12)
    assert_same(step(fast, x), step(plain, x))
