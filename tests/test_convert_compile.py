# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export, ONNX, symbolic tracing and TorchScript of converted networks."""

import copy
import warnings

import numpy
import onnxruntime
import pytest
import timm.models.dpn as timm_dpn
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torchvision.models.densenet as tv_densenet
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor

import fastdense
from fastdense import bicubic_resize, models
from tests.cases.converted import (
    assert_same,
    fastdense_warnings,
    images,
    pair,
    randomise,
    step,
    timm_net,
    torchvision_net,
)
from tests.cases.monai import monai_net
from tests.cases.random_block import relative
from tests.cases.random_norms import random_norms

# A block that falls back where the test does not expect it fails the test.
pytestmark = [pytest.mark.filterwarnings("error:fastdense"), pytest.mark.usefixtures("one_thread")]


# --- torch.compile --------------------------------------------------------------------------------------


class Graphs:
    """A backend that keeps the graphs that it compiles."""

    def __init__(self, backend: str) -> None:
        self.compile = torch._dynamo.lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.compile(graph, inputs)

    def fused_calls(self) -> list[int]:
        operators = (torch.ops.fastdense.dense_block, torch.ops.fastdense.dense_block.default)
        return [sum(node.target in operators for node in graph.graph.nodes) for graph in self.graphs]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_with_changing_sizes(mode):
    torch._dynamo.reset()
    plain, fast = (getattr(net, mode)() for net in pair(memory="min", block_config=(1, 2)))
    backend = Graphs("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for shape in ((2, 3, 64, 64), (3, 3, 96, 80), (4, 3, 72, 104), (5, 3, 77, 65)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(step(fast, x, run=compiled), step(plain, x))
    assert backend.fused_calls() == [2, 2], "one graph for the first size, one for all others"


def test_compile_timm_with_dropout():
    torch._dynamo.reset()
    _, fast = pair(timm_net, proj_drop_rate=0.5)
    backend = Graphs("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    x = images()
    outs = [step(fast, x, run=compiled)["out"] for _ in range(2)]
    assert not torch.equal(*outs)
    assert backend.fused_calls() == [2]
    assert fast.features.norm5.num_batches_tracked == 2


def test_compile_with_inductor():
    torch._dynamo.reset()

    def make():
        modules = [tv_densenet._DenseBlock(1, 4, 2, 2, 0.0), tv_densenet._Transition(6, 3)]
        return randomise(nn.Sequential(*modules).double())

    plain, fast = pair(make)
    compiled = torch.compile(fast, fullgraph=True)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for _ in range(2):
        assert_same(step(fast, x, run=compiled), step(plain, x))


def halving_norm(monkeypatch, net):
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: forward(self, x) * 0.5)


def halving_function(monkeypatch, net):
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: relu(x, inplace) * 0.5)


def halving_convolution(monkeypatch, net):
    conv = net[0].denselayer2.conv2
    conv._conv_forward = lambda x, w, b: F.conv2d(x, w * 0.5, b, 1, 1)


@pytest.mark.parametrize("change", [halving_norm, halving_function, halving_convolution])
def test_replaced_code_is_compiled(change, monkeypatch):
    torch._dynamo.reset()
    modules = [tv_densenet._DenseBlock(2, 4, 2, 2, 0.0), tv_densenet._Transition(8, 3)]
    net = randomise(nn.Sequential(*modules).double()).eval()
    fast = fastdense.convert(copy.deepcopy(net))
    for each in (net, fast):
        with monkeypatch.context() as patch, fastdense_warnings():
            change(patch, each)
            x = torch.ones(2, 4, 8, 8, dtype=torch.float64)
            each.made = torch.compile(each, backend="aot_eager")(x)
    assert relative(fast.made, net.made) <= 1e-10
    assert relative(fastdense.restore(fast)(x), net.made) > 1e-3 or change is halving_convolution


# --- export ---------------------------------------------------------------------------------------------


def dual_path_net() -> nn.Module:
    sizes = {"k_r": 8, "groups": 2, "k_sec": (1, 1, 2, 1), "inc_sec": (4, 4, 4, 4)}
    return random_norms(timm_dpn.DPN(num_init_features=6, num_classes=5, **sizes))


EXPORTED = {
    "torchvision": (torchvision_net, (2, 3, 64, 64)),
    "timm": (timm_net, (2, 3, 64, 64)),
    "monai": (monai_net, (2, 1, 24, 20, 28)),
    "dpn": (dual_path_net, (2, 3, 64, 64)),
    "rrdbnet": (lambda: models.RRDBNet(2, blocks=1, width=8, growth_rate=4), (2, 3, 12, 10)),
    "highway": (lambda: models.create("highway_cifar"), (2, 3, 32, 32)),
    "fractalnet": (lambda: models.create("fractalnet", columns=2, widths=(4, 6)), (2, 3, 8, 8)),
    "srcnn": (lambda: models.SRCNN(2), (2, 1, 9, 8)),
}


class Onnx:
    """A network as onnxruntime runs it; the axes of the batch and others may change their size."""

    def __init__(self, net: nn.Module, x: Tensor, axes: tuple[int, ...] = (0,)) -> None:
        shapes = ({axis: Dim.DYNAMIC for axis in axes},)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
        self.operators = {node.op_type for node in program.model.graph}
        proto = program.model_proto
        assert {node.domain for node in proto.graph.node} == {""}, "operators of ONNX alone"
        self.session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        (made,) = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        assert isinstance(made, numpy.ndarray)
        return torch.from_numpy(made)


@pytest.mark.parametrize("name", EXPORTED)
def test_onnxruntime_gives_the_same_numbers(name):
    make, shape = EXPORTED[name]
    net = make().float().eval()
    plain = fastdense.restore(copy.deepcopy(net))
    if name in ("torchvision", "timm", "monai", "dpn"):
        fastdense.convert(net)
    exported = Onnx(net, torch.randn(shape))
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            wanted = plain(x)
            assert relative(exported(x), wanted) <= 1e-5
            assert relative(net(x), wanted) <= 1e-5


def test_onnx_by_the_older_exporter(tmp_path):
    plain, fast = (net.float().eval() for net in pair(block_config=(1, 1)))
    x = images().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fast, (x,), tmp_path / "net.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(torch.from_numpy(made), plain(x)) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_only_operators_of_torch(strict):
    plain, fast = (net.eval() for net in pair())
    program = torch.export.export(fast, (images(),), dynamic_shapes=({0: Dim.DYNAMIC},), strict=strict)
    assert "fastdense" not in str(program.graph)
    x = images(3)
    assert relative(program.module()(x), plain(x)) <= 1e-10


class Resize(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return bicubic_resize(x, **self.options)


@pytest.mark.parametrize(
    ("options", "operator", "axes"),
    [
        ({"scale_factor": 1.7}, "Resize", (0, 2, 3)),
        ({"size": (9, 11), "align_corners": True}, "Resize", (0, 2, 3)),
        ({"size": (5, 7), "clamp": (0.1, 0.6)}, "Resize", (0, 2, 3)),
        ({"size": (9, 1), "preset": "torch_antialias"}, "MatMul", (0,)),
        ({"scale_factor": (0.4, 2.0), "preset": "matlab"}, "MatMul", (0,)),
        ({"scale_factor": 1.7, "preset": "pillow"}, "MatMul", (0,)),
        ({"scale_factor": 1.7, "preset": "opencv"}, "MatMul", (0,)),
    ],
)
def test_onnxruntime_resamples_the_same(options, operator, axes):
    net = Resize(options)
    exported = Onnx(net, torch.rand(2, 3, 12, 14), axes)
    assert operator in exported.operators
    for shape in ((1, 3, 12, 14), (3, 3, 17, 9) if len(axes) > 1 else (3, 3, 12, 14)):
        x = torch.rand(shape)
        assert relative(exported(x), net(x)) <= 1e-5


# --- symbolic tracing and TorchScript -------------------------------------------------------------------


def test_symbolic_tracing_records_the_plain_modules():
    plain, fast = pair()
    with pytest.warns(UserWarning, match="torch.fx makes of a converted model"):
        traced = torch.fx.symbolic_trace(fast)
    assert not [node for node in traced.graph.nodes if "fastdense" in str(node.target)]
    x = images()
    assert_same(step(traced, x), step(plain, x))


def test_features_extracted_by_torchvision():
    names = ["features.denseblock1", "features.transition1", "features.denseblock1.denselayer2.conv1", "flatten"]
    with pytest.warns(UserWarning, match="torch.fx makes of a converted model"):
        plain, fast = (create_feature_extractor(net, names)(x) for x in [images()] for net in pair())
    assert set(plain) == set(fast) == set(names)
    for name in names:
        assert relative(fast[name], plain[name]) <= 1e-10


@pytest.mark.parametrize("record", [torch.jit.script, lambda net: torch.jit.trace(net, images())])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_torchscript_says_what_to_do_instead(record):
    plain, fast = (net.eval() for net in pair())
    with pytest.raises(RuntimeError, match=r"fastdense: TorchScript .* fastdense\.restore\(model\).* torch\.export"):
        record(fast)
    x = images()
    assert relative(record(fastdense.restore(fast))(x), plain(x)) <= 1e-10
