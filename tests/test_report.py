# SPDX-License-Identifier: Apache-2.0
"""fastdense.report: what is fused, what is not and why, and the bytes that a step keeps."""

import doctest

import pytest
import torch
import torchvision

import fastdense
import fastdense.fusion.report
from fastdense import report
from tests.cases.converted import torchvision_net


def runs(made: object) -> list[tuple[str, str]]:
    return [(row.name, row.runs) for row in made.rows]


def test_a_converted_net():
    net = fastdense.convert(torchvision.models.densenet121())
    made = report(net, (3, 224, 224))
    assert [row.layers for row in made.rows if row.kind == "block"] == [6, 12, 24, 16]
    assert [row.kind for row in made.rows].count("transition") == 3
    assert {row.runs for row in made.rows} == {"fused"}
    # 7.77 and 1.63 GiB at batch 64
    assert made.plain_bytes / 2**20 == pytest.approx(124.3, abs=0.2)
    assert made.kept_bytes / 2**20 == pytest.approx(26.0, abs=0.1)
    assert made.saved_bytes == made.plain_bytes - made.kept_bytes
    assert made.kept_ratio == pytest.approx(26.0 / 124.3, abs=0.01)
    assert str(made).endswith("MiB; by plain modules: 124.3 MiB (ratio 0.21, 98.3 MiB less)")
    assert next(net.parameters()).device.type == "cpu"


def test_memory_mode_counts():
    nets = [fastdense.convert(torchvision_net().float(), memory=memory) for memory in ("balanced", "min")]
    kept = [report(net, (3, 64, 64)).kept_bytes for net in nets]
    assert kept[1] < kept[0]


def test_a_plain_net_says_what_to_do():
    made = report(torchvision_net())
    assert {row.runs for row in made.rows} == {"plain"}
    assert all("fastdense.convert" in row.reason for row in made.rows)
    assert (made.kept_bytes, made.saved_bytes, made.kept_ratio) == (None, None, None)
    made = report(torchvision_net(), (3, 64, 64))
    assert (made.saved_bytes, made.kept_ratio) == (0, 1.0)


def test_reasons_of_this_moment():
    net = fastdense.convert(torchvision_net())
    handle = net.features.denseblock1.denselayer1.conv1.register_forward_hook(lambda *_: None)
    net.features.transition1.relu = torch.nn.Hardtanh()
    made = report(net)
    assert runs(made) == [
        ("features.denseblock1", "plain"),
        ("features.transition1", "plain"),
        ("features.denseblock2", "fused"),
    ]
    assert "hooks" in made.rows[0].reason
    assert "Hardtanh" in made.rows[1].reason
    assert made.rows[1].reason in str(made)
    handle.remove()
    assert runs(report(net))[0] == ("features.denseblock1", "fused")


@pytest.mark.parametrize("shape", [64, (), (3, 64.0, 64), (3, -64, 64), "3x64x64"], ids=str)
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match=r"report: expected input_shape to be \[channels, spatial\] of one image, got"):
        report(torchvision_net(), shape)


def test_a_shape_that_the_model_does_not_run_on():
    with pytest.raises(
        ValueError, match=r"report: expected the model to run on input_shape, got \(1, 64, 64\): .*3 chan"
    ):
        report(torchvision_net(), (1, 64, 64))


def test_example():
    assert doctest.testmod(fastdense.fusion.report, optionflags=doctest.ELLIPSIS).failed == 0
