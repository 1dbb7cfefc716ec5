# SPDX-License-Identifier: Apache-2.0
"""Refuses pictures that would not fit into memory, by what their headers or sizes say."""

from __future__ import annotations

from fastdense._support import InputError, extra

# A deflated stream grows by at most so much.
DEFLATE = 1032


def check_fits(what: str, bytes_needed: float) -> None:
    """Refuses what needs more memory than is free.

    Args:
        what: beginning of the message, e.g. ``"resize: a result of 5 x 7"``.

    Raises:
        InputError: the message says how much is needed and how much there is.
    """
    with extra("cli"):
        import psutil
    free = psutil.virtual_memory().available
    if bytes_needed > free:
        raise InputError(f"{what} needs {bytes_needed / 2**30:,.1f} GiB of memory, expected at most {free / 2**30:.1f}")
