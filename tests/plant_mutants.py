# SPDX-License-Identifier: Apache-2.0
"""Plants the mistakes of tests/mutants.py in the native code, one at a time, and checks that the tests notice each.

Run ``make mutants`` (a quarter of an hour): every mistake is built in a copy of the tree and must make
a test of ``FILES`` fail; those in CUDA code with the emulated kernels. Mistakes in code for AVX-512 and AMX are noticed
on a processor that has them.
Arguments choose mistakes by a part of the file's name.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import CUDA_MUTANTS, MUTANTS

ROOT = Path(__file__).resolve().parent.parent

# Kernels alone first: they say what is wrong in the least time.
FILES = ["tests/emulation/test_conv1x1_kernels.py", "tests/emulation/test_dense_block_conv_kernels.py"]
FILES += ["tests/emulation/test_grouped_conv_kernels.py"]
FILES += ["tests/test_mean_join.py", "tests/test_residual_dense_block.py", "tests/test_norm_relu_max_pool.py"]
FILES += ["tests/test_dual_path.py", "tests/test_dense_block.py", "tests/test_sync_batch_norm.py"]
FILES += ["tests/test_fused_blocks.py", "tests/test_general_blocks.py", "tests/test_presets_bytes.py"]
FILES += ["tests/test_dense_block_inference.py", "tests/test_freeze.py", "tests/test_grouped_conv.py"]
FILES += ["tests/test_freeze_dual_path.py"]
FILES += ["tests/test_memory_modes.py"]


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | {"FORCE_CPU": "1"}, check=True, capture_output=True)


def survives(folder: Path, name: str, before: str, after: str, tests: str) -> bool:
    """Whether the tests of that name pass with the mistake in place."""
    path = folder / "csrc" / name
    text = path.read_text()
    assert before in text, f"{name} no longer contains {before!r}"
    path.write_text(text.replace(before, after))
    try:
        if (name, before, after) not in CUDA_MUTANTS:  # which the tests compile themselves
            build(folder)
        environment = os.environ | {"PYTHONPATH": str(folder)}
        test = [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, *FILES]
        return subprocess.run(test, cwd=folder, env=environment, capture_output=True).returncode == 0
    finally:
        path.write_text(text)


def main() -> int:
    parts = sys.argv[1:] or [""]
    chosen = [mutant for mutant in CUDA_MUTANTS + MUTANTS if any(part in mutant[0] for part in parts)]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="fastdense-mutants-") as temporary:
        folder = Path(temporary)
        for part in ("csrc", "fastdense", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        build(folder)
        for name, before, after in chosen:
            emulated = "emulated or fused_blocks" if (name, before, after) in CUDA_MUTANTS else ""
            alive = survives(folder, name, before, after, emulated)
            survivors += alive
            print(f"{'SURVIVED' if alive else 'caught  '} {name}: {before}  ->  {after or '(removed)'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
