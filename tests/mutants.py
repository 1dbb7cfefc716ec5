# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Plants mistakes in the native code, one at a time, and checks that the tests notice each.

Run ``make mutants`` (a few minutes): every mistake is built in a copy of the tree and must make
``tests/test_dense_block.py`` fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (file below csrc, what stands there, what is planted)
MUTANTS = [
    ("common/batch_norm_math.h", "g - shift_sum - (x - mean) * slope_sum", "g - shift_sum + (x - mean) * slope_sum"),
    ("common/batch_norm_math.h", "g - shift_sum - (x - mean) * slope_sum", "g - (x - mean) * slope_sum"),
    ("common/batch_norm_math.h", "(t1 + xhat * t2) * inv_count", "(xhat * t2) * inv_count"),
    ("common/batch_norm_math.h", "return {scale, bias - mean * scale, mean, rstd}", "return {scale, bias, mean, rstd}"),
    ("common/batch_norm_math.h", "delta * delta * p.count * share", "delta * delta * share"),
    ("common/batch_norm_math.h", "count / (count - 1)", "1.0"),
    ("common/row_sweeps.h", "relu_passes(mul_add(value, scale[i], shift[i])) ? dy[i] * share : A(0)", "true ? dy[i] * share : A(0)"),
    ("common/row_sweeps.h", "mul_add(scale[i], gradient, A(load(g[i])))", "mul_add(A(1), gradient, A(load(g[i])))"),
    ("common/row_sweeps.h", "weighted[i] += gradient * (value - mean[i])", "weighted[i] += gradient * value"),
    ("dense_block/dense_block_kernels_impl.h", "g, p, begin, end,", "g, p, begin + 1, end,"),
    ("dense_block/dense_block_kernels_impl.h", "g, p, 0, g.size[0],", "g, p, 0, g.size[0] - 1,"),
    ("common/row_sweeps.h", "? dy[i] * share : A(0)", "? dy[i] : A(0)"),
    ("dense_block/dense_block_kernels_impl.h", "apply_dropout(dropout, row, rows, n, d);", ""),
    ("common/row_gradients.h", "if (norm.frozen()) return;", ""),
    ("common/row_gradients.h", "norm.frozen() ? A(0) : A(1.0 / double(count))", "A(1.0 / double(count))"),
    ("common/row_gradients.h", "share * s.weighted[j] * double(c.rstd()[first + j])", "share * s.weighted[j]"),
    ("dense_block/dense_block_cpu.cpp", "layer.norm2, mean_ + at, var_ + at, args_.width", "layer.norm2, mean_, var_, args_.width"),
    ("common/gemm_amx.h", "w[p + 1] = _mm512_unpackhi_epi32(v[p], v[p + 1]);", "w[p + 1] = _mm512_unpackhi_epi32(v[p + 1], v[p]);"),
    ("common/gemm_amx.h", "i < round_up(depth, kAlign) / 2 * kPanel", "i < 0"),
    ("common/gemm.h", "i < columns ? value(r, i) : A(0)", "value(r, 0)"),
]  # fmt: skip


def survives(folder: Path, name: str, before: str, after: str) -> bool:
    """Whether the tests pass with the mistake in place."""
    path = folder / "csrc" / name
    text = path.read_text()
    assert before in text, f"{name} no longer contains {before!r}"
    path.write_text(text.replace(before, after))
    try:
        environment = os.environ | {"FORCE_CPU": "1", "PYTHONPATH": str(folder)}
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True)
        test = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_dense_block.py"]
        return subprocess.run(test, cwd=folder, env=environment, capture_output=True).returncode == 0
    finally:
        path.write_text(text)


def main() -> int:
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="fastdense-mutants-") as temporary:
        folder = Path(temporary)
        for part in ("csrc", "fastdense", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        for name, before, after in MUTANTS:
            alive = survives(folder, name, before, after)
            survivors += alive
            print(f"{'SURVIVED' if alive else 'caught  '} {name}: {before}  ->  {after or '(removed)'}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mistakes were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
