# SPDX-License-Identifier: Apache-2.0
"""Every kernel waits for those before it before it touches memory, see csrc/cuda/launch.h; without running any.

The emulation fails as well where a thread returns without the wait, or copies or reads a vector before it.
"""

import re
from pathlib import Path

import pytest

from benchmarks.ptxas import NEVER_STARTED, late_waits
from tests.emulation.build import ROOT

WAIT = "wait_for_kernels_before();"
BOUNDS = r"(?:__launch_bounds__\([^\n]*\)\s+)?"
KERNEL = re.compile(rf"__global__ void\s+{BOUNDS}(\w+)\([^;{{]*\) {{\n(.*?)^}}", re.MULTILINE | re.DOTALL)


def sources() -> dict[Path, str]:
    return {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".h", ".cpp")}


def kernels(text: str) -> dict[str, str]:
    """The bodies of a source's kernels, by name."""
    return dict(KERNEL.findall(text))


def begins_with_the_wait(body: str) -> bool:
    return body.lstrip().startswith(WAIT)


def test_every_kernel_of_the_sources_begins_with_the_wait():
    found = 0
    for path, text in sources().items():
        bodies = kernels(text)
        assert len(bodies) == text.count("__global__ ") - text.count(NEVER_STARTED + "() {"), path
        assert all(map(begins_with_the_wait, bodies.values())), path
        found += len(bodies)
    assert found > 15


def test_kernels_are_started_in_one_place():
    """That knows whether a kernel may be started before the one before it has ended."""
    for path, text in sources().items():
        if path.relative_to(ROOT).as_posix() != "csrc/cuda/launch.h":
            assert "<<<" not in text and "cudaLaunchKernel" not in text, path


@pytest.mark.parametrize(
    "body", ["  const float x = *p.x;\n  wait_for_kernels_before();\n", "  if (i > n) return;\n", "  // none\n"]
)
def test_a_kernel_without_the_wait_is_found(body):
    text = (
        f"template <int n>\n__global__ void __launch_bounds__(n, 2)\n    some_kernel(Params p,\n  int i) {{\n{body}}}\n"
    )
    assert kernels(text) == {"some_kernel": body}
    assert not begins_with_the_wait(body)


PTX = """
.visible .entry first(.param .u64 p) {{
  ld.param.u64 %rd1, [p];
  {0}
  ld.global.u32 %r1, [%rd1];
  {1}
}}
"""
WAITS, STARTS = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"


def test_ptx_is_searched_for_accesses_before_the_wait():
    """What benchmarks/ptxas.py asks of nvcc's output."""
    assert late_waits(PTX.format(WAITS + STARTS, "")) == []
    assert late_waits(PTX.format("", WAITS + STARTS)) == ["first"]
    assert late_waits(PTX.format("", "")) == ["first"]
    assert late_waits(PTX.format(STARTS + WAITS, "")) == ["first"]
    assert late_waits(PTX.format("bra $L__BB0_1;\n$L__BB0_1:\n" + WAITS + STARTS, "")) == ["first"]
    assert late_waits(PTX.format("", "").replace("first", "_12probe_kernelv")) == []
