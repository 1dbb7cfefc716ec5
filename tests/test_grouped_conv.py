# SPDX-License-Identifier: Apache-2.0
"""The CPU's own kernels for grouped 3x3 convolutions, in the dual path stage that runs them, against the reference."""

from dataclasses import replace

import pytest
import torch

from tests.cases.dual_path import Stage, StageCase
from tests.cases.random_block import check, check_bit_identical, low_precision_errors
from tests.cases.simd import LEVELS, has_level, simd_level

# Channels a group: lanes are groups or channels, whole vectors or not. The library takes 33, and 32 without a stride.
CHANNELS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 33)


def case(channels: int, groups: int, size: tuple[int, int], **fields) -> StageCase:
    """Two blocks, so that the second has a stride of 1."""
    return StageCase(
        num_blocks=2, width=channels * groups, width_behind=channels * groups, groups=groups, size=size, **fields
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_of_a_group(channels, stride):
    for groups, size in ((3, (5, 6)), (8, (4, 9))):
        check(Stage(case(channels, groups, size, stride=stride, batch=2)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 7, 9, 16, 21])
def test_groups_that_fill_lanes_or_do_not(groups, stride):
    for channels in (3, 4):
        check(Stage(case(channels, groups, (5, 4), stride=stride, batch=2)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", range(1, 16))
def test_sizes(side, stride):
    for channels in (3, 8):
        check(Stage(case(channels, 8, (side, 16 - side), stride=stride, batch=2)))
        check(Stage(case(channels, 8, (side, side), stride=stride, batch=3)))


@pytest.mark.parametrize(("width", "width_behind"), [(8, 24), (24, 8), (40, 16), (16, 40), (96, 8), (8, 96)])
def test_other_channels_behind(width, width_behind):
    for stride in (1, 2):
        shape = StageCase(num_blocks=2, width=width, width_behind=width_behind, groups=8, stride=stride, size=(5, 7))
        check(Stage(shape))


@pytest.mark.parametrize("shape", [case(3, 32, (40, 37)), case(16, 9, (31, 40), stride=2), case(6, 11, (64, 33))])
def test_images_in_several_stripes(shape):
    check(Stage(replace(shape, batch=2)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_of_this_machine(level):
    if not has_level(level):
        return
    with simd_level(level):
        for channels in CHANNELS[:-1]:
            for stride in (1, 2):
                check(Stage(case(channels, 9, (6, 5), stride=stride, batch=2)))
                shape = case(channels, 17, (9, 8), stride=stride, batch=4, dtype=torch.float32)
                ours, theirs = low_precision_errors(Stage, shape)
                assert all(mine <= 2 * other + 1e-6 for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("channels", [3, 8, 12])
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_modes_and_reruns_are_bit_identical(channels, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stage = Stage(case(channels, 10, (21, 19), stride=2, batch=2, dtype=torch.float32))
        check_bit_identical(stage, ["balanced", "min", "recompute", "balanced"])
    finally:
        torch.set_num_threads(before)
