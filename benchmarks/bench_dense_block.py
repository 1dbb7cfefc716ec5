# SPDX-License-Identifier: Apache-2.0
"""Single dense blocks, forward and backward, against plain PyTorch.

Run ``make bench``, or ``pytest benchmarks --benchmark-only``. The ratios of README.md and docs/measured.md come from
``fastdense bench``, which interleaves whole training steps of separate processes.
"""

import pytest

from benchmarks.harness import VARIANTS, WORKLOADS, Step, Workload, check_equal


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_training_step(benchmark, workload: Workload, variant: str) -> None:
    check_equal(workload, variant)
    step = Step(workload, variant)
    benchmark.group = f"forward and backward, {workload.name}"
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("variant", VARIANTS[:3])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_inference(benchmark, workload: Workload, variant: str) -> None:
    check_equal(workload, variant)
    step = Step(workload, variant)
    step.block.eval()
    benchmark.group = f"inference, {workload.name}"
    benchmark.pedantic(step.forward, rounds=9, warmup_rounds=2)
