# SPDX-License-Identifier: Apache-2.0
"""The dual path stage operator against the concatenating reference: CPU, CUDA, and the emulated CUDA code."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdense.ops import (
    LayerWeights,
    NormWeights,
    dense_block,
    dual_path_stage,
)
from fastdense.ops.arguments import PackedWeights
from fastdense.ops.dual_path import DUAL_PATH_MEMORY_MODES as MODES
from fastdense.ops.dual_path import FlatStage, flatten_stage, pack_stage, run_stage_inference
from tests.cases.dual_path import Stage, StageCase
from tests.cases.random_block import (
    check,
    check_any_output_gradient,
    check_bit_identical,
    check_one_gradient,
    low_precision_errors,
    relative,
)
from tests.cases.simd import LEVELS, has_level, simd_level
from tests.emulation.blocks import DEVICES, emulated_kernels, on_device

# Small enough for several chunks of pixels in most cases.
EMULATED_SCRATCH = 8 << 10


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's tensors live."""
    with on_device(request.param, EMULATED_SCRATCH) as device:
        yield device


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_emulated_kernels_are_what_runs(backwards):
    """And their results do not depend on the order of threads."""
    stage = Stage(StageCase(dtype=torch.float32, memory="min"))
    results = []
    for order in (False, backwards):
        with emulated_kernels(order, EMULATED_SCRATCH, 8) as library:
            before = library.launches()
            out, statistics = stage.run()
            results.append({"out": out, "var": statistics.var} | stage.gradients(out, torch.ones_like(out)))
            assert library.launches() > before
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(
    "head",
    [{}, {"stride": 2}, {"projection": False}],
    ids=["projection", "down", "normal"],
)
@pytest.mark.parametrize("size", [(9,), (7, 5), (5, 4, 3)], ids=["1d", "2d", "3d"])
def test_parity(device, size, head, memory):
    check(Stage(StageCase(size=size, memory=memory, **head, device=device)))


@pytest.mark.parametrize(
    "case",
    [
        StageCase(num_blocks=1),
        StageCase(num_blocks=1, stride=2, memory="reversible"),
        StageCase(num_blocks=1, projection=False, memory="min"),
        StageCase(num_blocks=6, stride=2, memory="reversible"),
        StageCase(frozen=("",), stride=2),
        StageCase(frozen=("",), projection=False, memory="min"),
        StageCase(frozen=("norm_a",)),
        StageCase(frozen=("1.norm_a", "projection", "0.norm_b"), stride=2, memory="reversible"),
        StageCase(frozen=("norm_b", "2.norm_c"), memory="min"),
        StageCase(frozen=("1.norm_a", "projection", "0.norm_b"), stride=2, memory="recompute"),
        StageCase(projection=False, memory="recompute"),
        StageCase(affine=False, stride=2),
        StageCase(residual_channels=0, stride=2),
        StageCase(residual_channels=0, projection=False, memory="reversible"),
        StageCase(growth_rate=0, first_dense=0),
        StageCase(growth_rate=0, projection=False, memory="reversible"),
        StageCase(first_dense=0, stride=2, memory="min"),
        StageCase(size=(1, 2)),
        StageCase(batch=6, size=(1, 1), stride=2),
        StageCase(batch=2, size=(9, 1), stride=2),
        StageCase(batch=2, residual_channels=70, growth_rate=20, first_dense=40, in_channels=130, width=48, groups=16,
                  width_behind=64, size=(17, 12), stride=2),
    ],
    ids=repr,
)  # fmt: skip
def test_parity_of_special_cases(device, case):
    check(Stage(replace(case, device=device)))


def test_parity_of_a_larger_stage():
    case = StageCase(
        batch=4, residual_channels=64, growth_rate=24, first_dense=48, in_channels=300, width=96, groups=32,
        width_behind=96, size=(20, 20), memory="reversible",
    )  # fmt: skip
    check(Stage(case))


# Gradients of conv_a that are larger than L2 go by columns: 300 residual channels are no multiple of what goes at once.
WIDE = StageCase(
    batch=2, residual_channels=300, growth_rate=24, first_dense=50, in_channels=60, width=96, groups=32,
    width_behind=32, size=(9, 8),
)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"memory": "reversible", "stride": 2},
        {"memory": "min", "frozen": ("1.norm_a",)},
        {"projection": False, "affine": False, "frozen": ("2.norm_b",)},
    ],
    ids=str,
)
def test_parity_of_a_wide_stage(options, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Stage(replace(WIDE, **options)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("part", ["input", "1.norm_a.weight", "1.conv_a", "2.norm_a.bias"])
def test_only_what_needs_a_gradient_gets_one_in_a_wide_stage(part):
    check_one_gradient(Stage(WIDE), part)


def test_wide_stages_are_bit_identical():
    check_bit_identical(
        Stage(replace(WIDE, width=192, dtype=torch.float32)), ["balanced", "min", "recompute", "balanced"]
    )


def test_three_strided_dimensions_and_an_uneven_stride(device):
    check(Stage(StageCase(size=(5, 4, 3), stride=2, memory="reversible", device=device)))
    check(Stage(StageCase(size=(11, 8), stride=3, device=device)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_of_this_machine(level):
    if not has_level(level):
        return
    shape = StageCase(residual_channels=37, growth_rate=5, first_dense=11, in_channels=23, width=18, width_behind=21)
    with simd_level(level):
        check(Stage(replace(shape, stride=2)))
        check(Stage(replace(shape, dtype=torch.float32, memory="reversible")), tolerance=2e-5)
        # A flipped ReLU weighs a lot in so small a stage, hence the sum and the factor.
        for dtype in (torch.bfloat16, torch.float16):
            ours, theirs = low_precision_errors(Stage, replace(shape, dtype=dtype, stride=2, size=(11, 9)))
            assert sum(ours) < 4 * sum(theirs)


@pytest.mark.parametrize(
    "case",
    [
        StageCase(2, 2, 1, 1, 3, 2, 2, 1, stride=2, batch=2, size=(3, 4)),
        StageCase(2, 2, 1, 1, 3, 2, 2, 2, projection=False, batch=2, size=(3, 3), memory="reversible"),
        StageCase(2, 2, 1, 1, 3, 2, 2, 1, batch=2, size=(4,), memory="min", frozen=("",)),
    ],
    ids=repr,
)
def test_gradcheck_of_a_whole_stage(case):
    stage = Stage(case)

    def run(*_):
        return stage.run()[0]

    assert torch.autograd.gradcheck(run, [stage.input, *stage.parameters], fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(device, dtype):
    # Two wide blocks: in more of them, or narrower ones, a flipped ReLU decides a gradient's error.
    shape = StageCase(
        num_blocks=2, batch=4, residual_channels=64, growth_rate=16, first_dense=32, in_channels=48, width=32,
        width_behind=64, groups=8, size=(12, 12), stride=2, dtype=dtype, device=device,
    )  # fmt: skip
    ours, theirs = low_precision_errors(Stage, shape)
    # A factor of 2: the order of torch's own sums depends on the processor.
    assert all(mine <= 2 * other + 1e-6 for mine, other in zip(ours, theirs, strict=True))
    assert sum(ours) <= 1.5 * sum(theirs)


def test_memory_modes_and_reruns_are_bit_identical(device):
    stage = Stage(StageCase(dtype=torch.float32, stride=2, size=(14, 14), device=device))
    check_bit_identical(stage, ["balanced", "min", "recompute", "balanced"])


def test_reversible_float32_is_close():
    stage = Stage(StageCase(dtype=torch.float32, num_blocks=12, size=(12, 12)))
    grad = stage.normal(3, 6 + 5 + 12 * 4, 12, 12)
    balanced, reversible = (stage.gradients(stage.run(memory)[0], grad) for memory in ("balanced", "reversible"))
    assert all(relative(reversible[name], balanced[name]) < 1e-4 for name in balanced)


@pytest.mark.parametrize(
    ("memory", "kept"),
    # (blocks - 1) residual versions; a of 35, then 2 * 12 pixels, b of 3 * 12, three images
    [("balanced", 2 * 6 * 12 + (35 + 24) * 6 + 36 * 9), ("min", 2 * 6 * 12), ("reversible", (35 + 24) * 6 + 36 * 9)],
)
def test_saved_numbers_match_the_closed_form(device, memory, kept):
    stage = Stage(StageCase(memory=memory, stride=2, device=device))
    out = (6 + 5 + 3 * 4) * 12
    norms = 7 + (7 + 15 + 19) + 3 * (6 + 9)
    assert stage.saved_numbers() == 3 * (out + kept) + 2 * norms


def test_recompute_saves_statistics_beside_the_input(device):
    stage = Stage(StageCase(memory="recompute", stride=2, device=device))
    norms = 7 + (7 + 15 + 19) + 3 * (6 + 9)
    assert stage.saved_numbers() == 2 * norms  # beside the input


def test_inference_is_the_same_and_keeps_nothing(device):
    for frozen in ((), ("",)):
        stage = Stage(StageCase(frozen=frozen, stride=2, device=device))
        kept, _ = stage.run()
        with torch.no_grad():
            out, _ = stage.run()
        assert torch.equal(out, kept)


@pytest.mark.parametrize(
    "part", ["input", "projection.conv", "0.norm_a.weight", "1.conv_a", "2.conv_b", "1.norm_c.bias"]
)
def test_only_what_needs_a_gradient_gets_one(device, part):
    for memory in MODES:
        check_one_gradient(Stage(StageCase(stride=2, device=device)), part, memory)


def test_gradient_that_is_expanded_strided_or_reused(device):
    check_any_output_gradient(Stage(StageCase(stride=2, device=device)))


def test_two_forwards_before_one_backward(device):
    first, second = Stage(StageCase(stride=2, device=device)), Stage(StageCase(stride=2, device=device), seed=1)
    outs = [stage.run()[0] for stage in (first, second)]
    for stage, out in zip((first, second), outs, strict=True):
        expected, _ = stage.expected()
        grad = torch.ones_like(out)
        actual, wanted = stage.gradients(out, grad), stage.gradients(expected, grad)
        assert all(relative(actual[name], wanted[name]) < 1e-12 for name in wanted)


def test_without_growth_the_stage_is_a_residual_network():
    """conv_c adds all its channels: a pre-activation ResNeXt, bit for bit what its sums give."""
    stage = Stage(StageCase(growth_rate=0, first_dense=0, projection=False, num_blocks=2))
    whole, _ = stage.run()
    x = stage.input
    for block in stage.blocks:
        x, _ = dual_path_stage(x, [block], residual_channels=6)
    assert torch.equal(whole, x)
    assert relative(whole, stage.expected()[0]) < 1e-14


def test_without_a_residual_path_the_stage_is_a_dense_block(device):
    """With conv_b dense and norm_c, conv_c an identity, a block is a dense layer without dropout."""
    stage = Stage(StageCase(residual_channels=0, projection=False, width=8, width_behind=4, groups=1, device=device))
    identity = torch.eye(4, dtype=torch.float64, device=device)[..., None, None]
    ones, zeros = stage.input.new_ones(4), stage.input.new_zeros(4)
    positive = NormWeights(None, 50 * ones, zeros, ones, 0.0)
    blocks = [block._replace(norm_c=positive, conv_c=identity) for block in stage.blocks]
    out, _ = dual_path_stage(stage.input, blocks, residual_channels=0)
    layers = [LayerWeights(b.norm_a, b.conv_a, b.norm_b, b.conv_b) for b in blocks]
    dense, _ = dense_block(stage.input, layers)
    # norm_c adds 50, so that its ReLU passes everything; batch norm behind it takes the constant away again.
    shift = out.new_zeros(out.shape[1])
    shift[5:] = 50
    torch.testing.assert_close(out - shift[:, None, None], dense, rtol=1e-10, atol=1e-10)


def test_inputs_of_any_strides(device):
    stage = Stage(StageCase(device=device))
    base = stage.normal(6, 14, 14, 10)
    view = base[::2, :7, ::2, ::2]
    arguments = stage.arguments()
    expected, _ = dual_path_stage(view.contiguous(), stage.blocks, **arguments)
    for other in (view, view.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(dual_path_stage(other, stage.blocks, **arguments)[0], expected)
    assert expected.is_contiguous(memory_format=torch.channels_last)


def packed_stage(case: StageCase) -> tuple[Stage, FlatStage, PackedWeights]:
    stage = Stage(replace(case, frozen=("",)))
    flat = flatten_stage(stage.blocks, stage.projection, case.residual_channels, case.stride)
    with torch.no_grad():
        return stage, flat, pack_stage(flat, stage.input.shape[1])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"stride": 2}, {"projection": False, "size": (6,)}, {"width": 60}], ids=str)
def test_packed_weights_give_the_same_bits(level, dtype, options):
    if not has_level(level):
        return
    with simd_level(level), torch.no_grad():
        stage, flat, packed = packed_stage(StageCase(dtype=dtype, **options))
        expected, _ = stage.run()
        assert torch.equal(run_stage_inference(stage.input, flat, packed), expected)
        assert torch.equal(run_stage_inference(stage.input, flat, packed, contiguous=True), expected)
        assert run_stage_inference(stage.input[:0], flat, packed).shape == (0, *expected.shape[1:])


def test_packed_weights_that_do_not_fit_are_refused():
    stage, flat, packed = packed_stage(StageCase(num_blocks=1))
    tensors = packed.tensors
    with torch.no_grad():
        for at in range(1, len(tensors)):
            for wrong in (tensors[at][:0] if tensors[at].numel() else torch.ones(1), tensors[at].to(torch.int16)):
                with pytest.raises((ValueError, TypeError), match="dual_path_stage_inference: expected packed"):
                    run_stage_inference(
                        stage.input, flat, packed._replace(tensors=[*tensors[:at], wrong, *tensors[at + 1 :]])
                    )
        with pytest.raises(ValueError, match="expected packed to have 9 entries, got 8"):
            run_stage_inference(stage.input, flat, packed._replace(tensors=tensors[:-1]))
        other = packed._replace(tensors=[tensors[0] + 17, *tensors[1:]])
        with pytest.raises(ValueError, match="packed to be made for"):
            run_stage_inference(stage.input, flat, other)
        training = Stage(StageCase())
        flat = flatten_stage(training.blocks, training.projection, 6, 1)
        with pytest.raises(ValueError, match="running statistics for every norm"):
            pack_stage(flat, training.input.shape[1])


def test_empty_batch(device):
    stage = Stage(StageCase(batch=0, frozen=("",), stride=2, device=device))
    out, _ = stage.run()
    assert out.shape == (0, 6 + 5 + 12, 4, 3)
    grads = stage.gradients(out, torch.zeros_like(out))
    assert all(grads[name].abs().sum() == 0 for name in grads)


def test_non_finite_values_propagate_as_in_torch(device):
    for value in (float("nan"), float("inf")):
        stage = Stage(StageCase(frozen=("",), device=device))
        with torch.no_grad():
            stage.input[1, 2, 3, 3] = value
        out, _ = stage.run()
        expected, _ = stage.expected()
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert not out.isfinite().all()


def test_autocast_computes_in_the_autocast_type():
    stage = Stage(StageCase(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out, statistics = stage.run()
    assert out.dtype == torch.bfloat16
    assert statistics.mean.dtype == torch.float32
    grads = stage.gradients(out, torch.ones_like(out))
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    exact = Stage(StageCase(dtype=torch.float32))
    assert relative(out.float(), exact.expected()[0]) < 0.05


def test_double_backward_and_in_place_edits_raise():
    stage = Stage(StageCase())
    out, _ = stage.run()
    (grad,) = torch.autograd.grad(out.square().sum(), stage.input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
    out, _ = stage.run()
    out.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def changed(stage: Stage, index: int, **fields: Tensor) -> dict:
    return {"blocks": [block._replace(**fields) if i == index else block for i, block in enumerate(stage.blocks)]}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "3 to 5 dimensions", lambda s: {"input": s.input[:, :, 0, 0]}),
        (ValueError, "more than 1 value per channel", lambda s: {"input": s.input[:1, :, :1, :1]}),
        (ValueError, "7 channels in dimension 1", lambda s: {"input": s.input[:, :6]}),
        (TypeError, "input to be torch.float64", lambda s: {"input": s.input.float()}),
        (TypeError, "to be a tensor, got list", lambda s: {"input": [1.0]}),
        (ValueError, "num_blocks to be at least 1", lambda s: {"blocks": []}),
        (ValueError, "residual_channels to be at least 0", lambda s: {"residual_channels": -1}),
        (ValueError, "projection.conv to have at least", lambda s: {"residual_channels": 12}),
        (ValueError, "conv_c to have at least", lambda s: {"residual_channels": 11}),
        (ValueError, "stride to be at least 1", lambda s: {"stride": 0}),
        (ValueError, "stride to be 1 without", lambda s: {"stride": 2, "projection": None}),
        (ValueError, "memory to be one of", lambda s: {"memory": "tiny"}),
        (ValueError, "block 1.conv_a.weight to have shape", lambda s: changed(s, 1, conv_a=s.normal(6, 9, 1, 1))),
        (ValueError, "into groups", lambda s: changed(s, 0, conv_b=s.normal(9, 4, 3, 3))),
        (ValueError, "kernel of block 0.conv_b to be odd", lambda s: changed(s, 0, conv_b=s.normal(9, 2, 2, 2))),
        (ValueError, "on cpu like input, got meta", lambda s: changed(s, 2, conv_c=s.blocks[2].conv_c.to("meta"))),
    ],
)  # fmt: skip
def test_errors(error, message, arguments):
    stage = Stage(StageCase())
    given = {"input": stage.input, "blocks": stage.blocks} | stage.arguments() | arguments(stage)
    with pytest.raises(error, match=f"dual_path_stage: expected .*{message}"):
        dual_path_stage(given.pop("input"), given.pop("blocks"), **given)


def test_reversible_refuses_16_bits():
    stage = Stage(StageCase(dtype=torch.bfloat16, memory="reversible"))
    with pytest.raises(NotImplementedError, match="float32 or float64"):
        stage.run()
    with torch.no_grad():  # nothing to reverse
        stage.run()
