# SPDX-License-Identifier: Apache-2.0
"""The names of all native operators, and valid arguments of each."""

import math

import torch

import fastdense  # noqa: F401  (registers the operators)
from fastdense.ops import Activation
from tests.cases.dense_block import ALL, Block, Case
from tests.cases.dual_path import Stage, StageCase
from tests.cases.norm_relu_max_pool import ALL as GIVEN
from tests.cases.norm_relu_max_pool import Case as StemCase
from tests.cases.norm_relu_max_pool import Stem
from tests.cases.residual_dense_block import Block as ResidualBlock
from tests.cases.residual_dense_block import Case as ResidualCase


def operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastdense::") for name in names if name.startswith("fastdense::"))


def dense_block_samples():
    from fastdense.ops.arguments import fill_absent
    from fastdense.ops.dense_block import flatten_block, without_dropped

    for case in (
        Case(tail="transition", drop_rate=0.2),
        Case(tail="none", size=(6,)),
        Case(tail="norm", active=(True, False, True)),
        Case(tail="norm_relu", width=0, size=(4, 3, 2), memory="min"),
        Case(tail="norm", frozen=ALL, dtype=torch.float32),
        Case(tail="transition", bias=True, num_layers=2, acts=(Activation("prelu"), Activation("elu", 0.7))),
        Case(tail="norm_relu", width=0, num_layers=2, acts=(Activation("softplus", 1.5, 2.0), Activation("gelu"))),
        Case(tail="transition", norm_groups=2, num_layers=2, frozen=("1.norm1",)),
        Case(
            tail="norm_relu", norm_groups=-1, num_layers=3, active=(True, False, True), acts=(Activation("elu", 0.7),)
        ),
    ):
        block = Block(case)
        flat = flatten_block(without_dropped(block.layers, case.active), block.tail)
        options = (case.num_layers, case.width > 0, case.tail, case.drop_rate, block.seed)
        yield (
            block,
            fill_absent(flat.weights, block.input),
            flat.eps,
            options,
            (flat.activations, flat.numbers, flat.groups),
        )


def inference_samples(name: str):
    from fastdense.ops.arguments import fill_absent
    from fastdense.ops.dense_block import flatten_block

    for case in (
        Case(tail="transition", frozen=ALL),
        Case(tail="none", size=(6,), frozen=ALL),
        Case(tail="norm", frozen=ALL, dtype=torch.float32),
        Case(tail="norm_relu", width=0, size=(4, 3, 2), frozen=ALL),
    ):
        block = Block(case)
        flat = flatten_block(block.layers, block.tail)
        weights = [w.detach() for w in fill_absent(flat.weights, block.input)]
        how = (flat.eps, case.num_layers, case.width > 0, case.tail)
        if name == "pack_dense_block":
            yield weights, flat.eps, block.input.shape[1], *how[1:]
        else:
            yield block.input.detach(), weights, *how, [], case.width > 0


def dual_path_samples():
    from fastdense.ops.arguments import fill_absent
    from fastdense.ops.dual_path import flatten_stage

    for case in (
        StageCase(stride=2),
        StageCase(projection=False, size=(6,), memory="min"),
        StageCase(size=(4, 3, 2), memory="reversible", dtype=torch.float32),
        StageCase(frozen=("",), num_blocks=1, memory="recompute"),
    ):
        stage = Stage(case)
        flat = flatten_stage(stage.blocks, stage.projection, case.residual_channels, case.stride)
        yield (
            stage,
            fill_absent(flat.weights, stage.input),
            flat.eps,
            (case.num_blocks, case.projection, case.residual_channels, case.stride),
        )


def dual_path_inference_samples(name: str):
    from fastdense.ops.arguments import fill_absent
    from fastdense.ops.dual_path import flatten_stage

    for case in (
        StageCase(stride=2, frozen=("",)),
        StageCase(projection=False, size=(6,), frozen=("",)),
        StageCase(size=(4, 3, 2), dtype=torch.float32, frozen=("",)),
    ):
        stage = Stage(case)
        flat = flatten_stage(stage.blocks, stage.projection, case.residual_channels, case.stride)
        weights = [w.detach() for w in fill_absent(flat.weights, stage.input)]
        options = (case.num_blocks, case.projection, case.residual_channels, case.stride)
        channels = stage.input.shape[1]
        if name == "pack_dual_path_stage":
            yield weights, flat.eps, channels, *options
        else:
            yield stage.input.detach(), weights, flat.eps, *options, [], case.projection


def residual_dense_block_samples(name: str):
    for case in (
        ResidualCase(outer=True),
        ResidualCase(kernel=1, slope=0.0, bias=False),
        ResidualCase(fusion=False, first=(0, 5, 0)),
    ):
        block = ResidualBlock(case)
        absent = torch.empty(0, dtype=torch.float64)
        weights = [absent if w is None else w for conv in block.convs() for w in conv]
        how = (list(case.first or [0] * case.layers), case.fusion, case.slope, 0.3)
        if name == "residual_dense_block":
            yield block.input, weights, *how, block.outer, 0.7, case.fusion, not case.fusion
            continue
        with torch.no_grad():
            out, buffer = torch.ops.fastdense.residual_dense_block(block.input, weights, *how, None, 1.0)
            needs = [True] + [w.requires_grad for w in weights]
            parameters = [w.detach() for w in weights]
            kept = buffer if case.fusion else out
            yield torch.randn_like(out), kept, parameters, *how, 1.0, case.channels, needs


def norm_relu_max_pool_samples(name: str):
    from fastdense.ops.arguments import fill_absent

    for case in (
        StemCase(),
        StemCase(channels_last=True, dtype=torch.float32),
        StemCase(size=(7,), kernel=(3,), stride=(1,), padding=(0,), affine=False),
        StemCase(frozen=GIVEN, channels_last=True),
    ):
        stem = Stem(case)
        norm = fill_absent(stem.weights[:4], stem.input)
        options = 1e-3, *map(list, stem.pool)
        if name == "norm_relu_max_pool":
            yield stem.input, norm, *options, True, ""
            continue
        with torch.no_grad():
            parameters = [w.detach() for w in norm]
            out, *saved = torch.ops.fastdense.norm_relu_max_pool(stem.input, parameters, *options, True, "")
            needs = [True] + [w.requires_grad for w in norm]
            yield torch.randn_like(out), stem.input.detach(), *saved, parameters, *options, needs, ""


def samples(name: str):
    if name == "dense_block":
        for block, weights, eps, options, activations in dense_block_samples():
            keep, contiguous = block.case.memory == "balanced", block.case.width > 0
            yield block.input, weights, eps, *options, keep, "", contiguous, *activations, False
    elif name == "_dense_block_backward":
        for block, weights, eps, options, activations in dense_block_samples():
            with torch.no_grad():
                keep = block.case.memory == "balanced"
                forward = torch.ops.fastdense.dense_block
                out, buffer, *saved = forward(block.input, weights, eps, *options, keep, "", False, *activations)
                grad = torch.randn_like(out)
                buffer = out if block.case.tail == "none" else buffer
                needs = [True] + [w.requires_grad for w in weights]
                parameters = [w.detach() for w in weights]
                yield grad, buffer, *saved, parameters, eps, *options, block.input.shape[1], needs, "", *activations
    elif name in ("dense_block_inference", "pack_dense_block"):
        yield from inference_samples(name)
    elif name in ("dual_path_stage_inference", "pack_dual_path_stage"):
        yield from dual_path_inference_samples(name)
    elif name == "dual_path_stage":
        for stage, weights, eps, options in dual_path_samples():
            yield stage.input, weights, eps, *options, stage.case.memory, "", stage.case.projection
    elif name == "_dual_path_stage_backward":
        for stage, weights, eps, options in dual_path_samples():
            with torch.no_grad():
                saved = torch.ops.fastdense.dual_path_stage(stage.input, weights, eps, *options, stage.case.memory, "")
                grad = torch.randn_like(saved[0])
                needs = [True] + [w.requires_grad for w in weights]
                yield grad, stage.input.detach(), *saved, [w.detach() for w in weights], eps, *options, needs, ""
    elif name == "update_running_stats_":
        lists = [torch.zeros(3), torch.zeros(5)], [torch.ones(3), torch.ones(5)], [torch.tensor(0), torch.tensor(4)]
        arguments = *lists, torch.randn(8), torch.rand(8), [0, 3], [0.1, -1.0]
        yield *arguments, 10, None
        yield *arguments, 0, torch.tensor([10.0], dtype=torch.float64)
    elif name in ("bicubic", "_bicubic_backward", "bicubic_uint8"):
        options = [0.9, 2.0], -0.5, True, "symmetric", False
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.rand(2, 3, 5, 6).to(memory_format=layout).requires_grad_()
            if name == "bicubic":
                yield x, [7, 3], *options, None, -math.inf, math.inf
                yield x, [7, 3], *options, torch.rand(2, 3, 7, 3, requires_grad=True), -math.inf, math.inf
                yield x.detach(), [7, 3], *options, None, 0.0, 1.0
            elif name == "_bicubic_backward":
                yield x, [7, 12], *options
            else:
                yield (x.detach() * 255).to(torch.uint8), [7, 3], *options, "matlab"
    elif name in ("highway_gate", "_highway_gate_backward"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 5, 4, requires_grad=True)
            projection = torch.randn(2, 6, 5, 4).to(memory_format=layout).requires_grad_()
            if name == "highway_gate":
                yield x, projection, "relu"
                yield x.detach(), projection, "tanh"
            else:
                yield torch.randn(2, 3, 5, 4), x.detach(), projection.detach(), "identity"
    elif name in ("residual_dense_block", "_residual_dense_block_backward"):
        yield from residual_dense_block_samples(name)
    elif name in ("norm_relu_max_pool", "_norm_relu_max_pool_backward"):
        yield from norm_relu_max_pool_samples(name)
    elif name in ("dual_path_merge", "dual_path_split"):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 7, 5, 4).to(memory_format=layout).requires_grad_()
            if name == "dual_path_merge":
                yield x, torch.randn(2, 6, 5, 4, requires_grad=True), 4
            else:
                yield x, 6, 4
    elif name == "mean_join":
        for layout in (torch.contiguous_format, torch.channels_last):
            first = torch.randn(2, 3, 5, 4).to(memory_format=layout).requires_grad_()
            yield ([first, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4, requires_grad=True)],)
    elif name == "dropout_mask":
        yield torch.tensor(5), 1, 6, 7, 0.3
