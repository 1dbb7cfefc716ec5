# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the block operators: streams, graphs, synchronisation, agreement with the CPU."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastdense
from fastdense import reference
from tests.cases import residual_dense_block as residual
from tests.cases.dense_block import Block, Case
from tests.cases.dual_path import Stage, StageCase
from tests.cases.random_block import RandomBlock, relative
from tests.emulation.blocks import chosen

pytestmark = pytest.mark.gpu

DENSE = Case(batch=4, in_channels=24, growth_rate=12, width=48, size=(14, 14), tail="transition", device="cuda")
DROPPING = replace(DENSE, drop_rate=0.2)
DUAL = StageCase(
    batch=4, residual_channels=32, growth_rate=8, first_dense=16, in_channels=24, width=32, width_behind=32, groups=8,
    size=(14, 14), stride=2, device="cuda",
)  # fmt: skip
RESIDUAL = residual.Case(channels=24, growth=12, size=(14, 14), outer=True, batch=4)
OWN_FEATURES = RESIDUAL._replace(outer=False, fusion=False, first=(0, 24, 24))
CASES = pytest.mark.parametrize(
    "case", [DROPPING, DUAL, RESIDUAL], ids=["dense_block", "dual_path_stage", "residual_dense_block"]
)
AnyCase = Case | StageCase | residual.Case


@pytest.fixture(autouse=True, params=["library", "fused"])
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways; same bits on every run, and float32 products in float32."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with flags, chosen(request.param):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(case: AnyCase, **changes: object) -> RandomBlock | residual.Block:
    if isinstance(case, residual.Case):
        torch.manual_seed(0)
        return residual.Block(case, changes.get("dtype", torch.float64), changes.get("device", "cuda"))
    return (Block if isinstance(case, Case) else Stage)(replace(case, **changes))


def results(block: RandomBlock | residual.Block) -> dict[str, Tensor]:
    if isinstance(block, residual.Block):
        return {str(at): tensor.detach() for at, tensor in enumerate(residual.results(block))}
    out, statistics = block.run()
    grads = block.gradients(out, torch.ones_like(out))
    return {"out": out.detach(), "mean": statistics.mean, "var": statistics.var} | grads


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case",
    [DENSE, DROPPING, DUAL, RESIDUAL, OWN_FEATURES],
    ids=["dense_block", "dropout", "dual_path_stage", "residual_dense_block", "own-features"],
)
def test_cpu_and_gpu_agree(case, dtype):
    actual, expected = results(make(case, dtype=dtype)), results(make(case, dtype=dtype, device="cpu"))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for name in expected:
        assert relative(actual[name].cpu(), expected[name]) < tolerance, name


@pytest.mark.parametrize("memory", ["balanced", "min"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@CASES
def test_reruns_are_bit_identical(case, dtype, memory):
    block = make(case, dtype=dtype, memory=memory)
    first = results(block)
    assert all(same_bits(results(block), first) for _ in range(3))


@CASES
def test_nothing_waits_for_the_device(case):
    block = make(case, dtype=torch.float32)
    results(block)
    with no_synchronisation():
        results(block)


@CASES
def test_any_stream_of_any_device(case):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    block = make(case, dtype=torch.float32, device=last)
    expected = results(block)
    stream = torch.cuda.Stream(last)
    stream.wait_stream(torch.cuda.current_stream(last))
    with torch.cuda.stream(stream):
        actual = results(block)
    stream.synchronize()
    assert same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CASES
def test_a_captured_graph_replays_the_same_bits(case, dtype):
    block = make(case, dtype=dtype)
    expected = results(block)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(block)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(block)
    for _ in range(2):
        for tensor in captured.values():
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured, expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_pictures_larger_than_the_cache_go_in_stripes(kernel):
    """Layers whose prefix is larger than the workspace see it line by line, with a halo."""
    case = residual.Case(channels=64, growth=32, layers=4, size=(301, 402), batch=2, outer=True, kernel=kernel)
    block = make(case, dtype=torch.float32)
    for actual, expected in zip(
        residual.results(block), residual.results(block, reference.residual_dense_block), strict=True
    ):
        assert relative(actual, expected) < 1e-4


def test_super_resolution_runs_fused_like_the_plain_network():
    torch.manual_seed(0)
    for model in (fastdense.models.RRDBNet(4, 1), fastdense.models.RDN(2, 2, 3), fastdense.models.SRDenseNet(2)):
        model.cuda().eval()
        pictures = torch.rand(1, model.colours, 24, 20, device="cuda")
        plain = fastdense.restore(copy.deepcopy(model))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")  # none may say that a block runs as plain modules
            torch.testing.assert_close(model(pictures), plain(pictures), rtol=1e-3, atol=1e-4)
            half = fastdense.upscale(model.half(), pictures.half())
        assert relative(half.float(), plain(pictures)) < 2e-2


def model_and_images() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    model = fastdense.models.create("densenet_cifar", depth=22, growth_rate=12, num_classes=10).cuda()
    return model, torch.randn(8, 3, 32, 32, device="cuda")


def test_a_model_runs_fused_and_trains_like_the_plain_one():
    model, images = model_and_images()
    plain = fastdense.restore(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none may say that a block runs as plain modules
        out = model(images)
    expected = plain(images)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    for each in (out, expected):
        each.square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, other.grad) < 1e-2, name
    for (name, mine), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3, msg=name)


def test_graphed_and_compiled_models_give_the_same():
    model, images = model_and_images()
    expected = copy.deepcopy(model)(images)
    compiled = torch.compile(copy.deepcopy(model), mode="reduce-overhead", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-3, atol=1e-3)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (images,))
    out = graphed(images)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    out.sum().backward()
