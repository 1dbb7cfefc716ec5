# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in a training run: the step under way ends, a checkpoint is written, then the run stops."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

# A second signal sooner than this is the same request: torchrun and the terminal both send one.
_SAME_REQUEST = 1.0  # seconds


class Interrupts:
    """Whether Ctrl-C was pressed since the run began."""

    def __init__(self) -> None:
        self.first: float | None = None

    @property
    def asked(self) -> bool:
        return self.first is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C waits for the end of the step; another one later does not."""
        if self.first is not None and time.monotonic() - self.first > _SAME_REQUEST:
            signal.default_int_handler(number, frame)
        self.first = self.first or time.monotonic()


@contextlib.contextmanager
def deferred() -> Iterator[Interrupts]:
    """Notes Ctrl-C instead of raising KeyboardInterrupt; elsewhere than in the main thread, or where the program has
    a handler of its own, nothing changes."""
    interrupts = Interrupts()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
