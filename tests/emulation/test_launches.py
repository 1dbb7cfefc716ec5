# SPDX-License-Identifier: Apache-2.0
"""Every kernel waits for those before it before it touches memory, see csrc/cuda/launch.h; without running any.

The emulation fails as well where a thread returns without the wait, or copies or reads a vector before it.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cuda_counts import find_tool
from benchmarks.ptxas import FLAGS
from tests.emulation.build import ROOT

WAIT = "wait_for_kernels_before();"
BOUNDS = r"(?:__launch_bounds__\([^\n]*\)\s+)?"
KERNEL = re.compile(rf"__global__ void\s+{BOUNDS}(\w+)\([^;{{]*\) {{\n(.*?)^}}", re.MULTILINE | re.DOTALL)
NEVER_STARTED = "probe_kernel"
ACCESS = re.compile(r"\b(ld|st|atom|red)\.(volatile\.)?global\b|\bcp\.async\.c[ag]\b|^\$L", re.MULTILINE)


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


def ptx_of_kernels(arch: str, folder: Path) -> list[str]:
    """Of a file that compiles fast, what nvcc makes of each kernel."""
    target = folder / f"{arch}.ptx"
    flags = [flag for flag in FLAGS if flag != "--resource-usage"]
    command = [find_tool("nvcc"), *flags, "-ptx", f"-arch=compute_{arch}", "-o", str(target)]
    subprocess.run([*command, str(ROOT / "csrc/mean_join/mean_join_kernels.cu")], check=True)
    return target.read_text().split(".entry ")[1:]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc; the sources are read without")
def test_the_wait_is_an_instruction_from_compute_capability_90_on(tmp_path):
    for kernel in ptx_of_kernels("90", tmp_path):
        wait, first = kernel.index("griddepcontrol.wait;"), ACCESS.search(kernel)
        assert wait < kernel.index("griddepcontrol.launch_dependents;")
        assert first is not None
        assert wait < first.start()
    before = ptx_of_kernels("80", tmp_path)
    assert before
    assert not any("griddepcontrol" in kernel for kernel in before)
