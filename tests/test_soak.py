# SPDX-License-Identifier: Apache-2.0
"""A hundred training steps in one process leave no tensor and no Python object behind; ``make soak`` takes more."""

import gc

import pytest

from benchmarks.soak import NETWORKS, training
from tests.cases.allocator import watched_allocator

WARM = 10
WINDOWS, STEPS = 3, 30


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_leave_nothing_behind(name):
    """What steps leave, every window leaves; one object more in one of them is another thread's, which waits."""
    with watched_allocator() as watch:
        steps = training(name, side=16)
        for _ in range(WARM):
            next(steps)
        in_use, grown = watch.bytes_in_use(), []
        for _ in range(WINDOWS):
            gc.collect()
            objects = len(gc.get_objects())
            for _ in range(STEPS):
                next(steps)
                assert watch.bytes_in_use() == in_use
            gc.collect()
            grown.append(len(gc.get_objects()) - objects)
        assert min(grown) <= 0, grown
