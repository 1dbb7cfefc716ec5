# SPDX-License-Identifier: Apache-2.0
"""Amounts of memory as people write and read them."""

import os
import re
from pathlib import Path

import torch

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for ending, base in (("ib", 1024), ("b", 1000), ("", 1024))
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", re.IGNORECASE)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def read_budget(op: str, budget: int | float | str, device: torch.device) -> int:
    """Bytes of a number, of "8GiB", "500 MB" and the like, or of "80%" of the device's memory.

    Errors begin with ``op``.

    Raises:
        ValueError: what is none of these, not above 0, or above 100%.
    """
    written = _AMOUNT.fullmatch(str(budget)) if isinstance(budget, str) else None
    if written is not None and written[2] == "%":
        if float(written[1]) > 100:
            raise ValueError(f"{op}: expected budget to be at most 100% of the device's memory, got {budget!r}")
        amount = float(written[1]) / 100 * device_memory(device)
    elif written is not None and written[2].lower() in _UNITS:
        amount = float(written[1]) * _UNITS[written[2].lower()]
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        amount = float(budget)
    else:
        raise ValueError(f'{op}: expected budget to be bytes, or like "8GiB" or "80%", got {budget!r}')
    if not 1 <= amount < float("inf"):
        raise ValueError(f"{op}: expected budget to be at least 1 byte, got {budget!r}")
    return int(amount)


def device_memory(device: torch.device) -> int:
    """All memory of a device in bytes; of a CPU's what this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no limit, which is called "max"
        return memory


def show_bytes(count: float) -> str:
    """``12.3 MiB`` or ``4.56 GiB``."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"
