# SPDX-License-Identifier: Apache-2.0
"""A hundred training steps in one process leave no tensor and no Python object behind; ``make soak`` takes more."""

import gc

import pytest

from benchmarks.soak import NETWORKS, training
from tests.allocator import watched_allocator

STEPS = 100
WARM = 10


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_leave_nothing_behind(name):
    with watched_allocator() as watch:
        steps = training(name, side=16)
        for _ in range(WARM):
            next(steps)
        gc.collect()
        in_use, objects = watch.bytes_in_use(), len(gc.get_objects())
        for _ in range(STEPS - WARM):
            next(steps)
            assert watch.bytes_in_use() == in_use
        gc.collect()
        assert len(gc.get_objects()) <= objects
