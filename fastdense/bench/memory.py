# SPDX-License-Identifier: Apache-2.0
"""Memory of this process, and what a measured set of peaks says per image."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
MIB = 2**20


def resident_mib() -> float:
    """Memory of this process that is resident now, in MiB; the peak where /proc is missing."""
    return _proc_status("VmRSS") or _rusage_mib()


def peak_resident_mib() -> float:
    """Largest resident memory of this process so far, in MiB.

    Read as VmHWM where there is a /proc. It is what ru_maxrss reports, except that ru_maxrss also
    remembers the size of the *parent* that started this process, up to the exec.
    """
    return _proc_status("VmHWM") or _rusage_mib()


def _proc_status(field: str) -> float | None:
    """A field of /proc/self/status in MiB, or None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def _rusage_mib() -> float:
    """ru_maxrss, which counts KiB on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def mib_per_image(peaks: Mapping[int, float]) -> float:
    """Slope of peak memory over batch size: the least-squares line through the points.

    What does not grow with the batch (libraries, weights, optimizer) drops out.

    Args:
        peaks: peak memory in MiB by batch size; at least two batch sizes.

    Returns:
        MiB per image.
    """
    if len(peaks) < 2:
        raise ValueError(f"mib_per_image: expected peaks to hold at least two batch sizes, got {len(peaks)}")
    mean_batch = sum(peaks) / len(peaks)
    mean_peak = sum(peaks.values()) / len(peaks)
    covariance = sum((batch - mean_batch) * (mib - mean_peak) for batch, mib in peaks.items())
    return covariance / sum((batch - mean_batch) ** 2 for batch in peaks)


# Environment of a process whose memory is measured: glibc keeps freed blocks up to 32 MiB for itself otherwise, and a
# peak then says how well they happened to fit, not what was needed.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def peak_above(run: Callable[[], T]) -> tuple[float, T]:
    """Peak of resident memory while ``run`` runs, in MiB above what is resident before, and the result of ``run``.

    To be called once what ``run`` uses has been loaded, for instance after the same on a small input. Where the system
    cannot reset the peak (Linux can), an earlier one counts.
    """
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as peaks:
        peaks.write("5")  # VmHWM becomes VmRSS
    before = resident_mib()
    result = run()
    return peak_resident_mib() - before, result
