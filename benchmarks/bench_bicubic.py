# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling, forward and backward, against torch. The ratios of docs/measured.md are of bicubic_targets.py."""

import pytest
import torch

from benchmarks.bicubic_targets import SHAPES, float_runs


@pytest.mark.parametrize("variant", ["torch", "fastdense"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", SHAPES[1:], ids=lambda case: "x".join(map(str, (*case[0], *case[1]))))
def test_bicubic(benchmark, case, direction: str, variant: str) -> None:
    runs = float_runs(*case, torch.contiguous_format)[direction]
    benchmark.group = f"bicubic {direction}, {case[0]} to {case[1]}"
    benchmark.pedantic(runs[variant], rounds=7, warmup_rounds=2)
