# SPDX-License-Identifier: Apache-2.0
"""The plan of the house: what may include what, how full a folder may be, how many parameters a function has."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))

CPU = re.compile(r"^cpu/|_cpu\.(cpp|h)$|_kernels(_impl)?\.h$")
CUDA = re.compile(r"^cuda/|_cuda\.(cpp|h)$|_launch\.h$|\.cu$")
NEITHER = re.compile(r"^core/|^(\w+)/\1(_math|_ops)?\.(cpp|h)$")  # and the front half of an operator


def included(name: str, known: set[str]) -> set[str]:
    """The headers of csrc/ behind a file, through all their includes."""
    for header in re.findall(r'^#include "(.+)"', (CSRC / name).read_text(), re.MULTILINE):
        if (CSRC / header).exists() and header not in known:
            known.add(header)
            included(header, known)
    return known


@pytest.mark.parametrize(
    ("files", "forbidden"), [(CPU, "cuda/"), (CUDA, "cpu/"), (NEITHER, ("cpu/", "cuda/"))], ids=["cpu", "cuda", "core"]
)
def test_no_device_includes_the_other(files: re.Pattern[str], forbidden: str | tuple[str, ...]):
    chosen = [name for name in SOURCES if files.search(name)]
    assert len(chosen) > 15
    wrong = [(name, header) for name in chosen for header in included(name, set()) if header.startswith(forbidden)]
    assert not wrong


def test_folders_stay_small():
    for top in ("csrc", "fastdense"):
        for folder in (ROOT / top, *filter(Path.is_dir, (ROOT / top).rglob("*"))):
            files = [path.name for path in folder.iterdir() if path.suffix in (".h", ".cpp", ".cu", ".py", ".pyi")]
            assert len(files) <= 20, f"{folder.relative_to(ROOT)} has {len(files)} files"


def test_instruction_sets_have_no_files_of_their_own():
    """setup.py writes them into build/kernels."""
    targets = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    assert not [name for name in SOURCES if name.endswith(tuple(f"_{target}.cpp" for target in targets))]
    assert not [name for name in SOURCES if "#define FASTDENSE_TARGET " in (CSRC / name).read_text()]


def parameter_lists(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of parameters of every function that a text declares."""
    text = re.sub(r'//.*|"(?:[^"\\\n]|\\.)*"', "", text)
    for start in re.finditer(r"[\w>&*] [&*]*(?P<name>\w+)\(|\(\*(?P<pointer>\w+)\)\(", text):
        if re.search(r"\b(return|else|new)\s+\w+\($", start[0]):
            continue
        depth = commas = 0
        for at in range(start.end() - 1, len(text)):
            depth += (text[at] in "([{<") - (text[at] in ")]}" or (text[at] == ">" and text[at - 1] != "-"))
            commas += text[at] == "," and depth == 1
            if depth == 0:
                break
        yield start["name"] or start["pointer"], commas + 1


def test_functions_have_few_parameters():
    """At most eight; more are a struct. Those that the dispatcher calls have what their schema says."""
    texts = {name: (CSRC / name).read_text() for name in SOURCES}
    registered = {op for text in texts.values() for op in re.findall(r'm\.impl\("\w+", &(\w+)', text)}
    found = {(path, *function) for path, text in texts.items() for function in parameter_lists(text)}
    assert ("cpu/block_forward.h", "statistics", 7) in found
    assert ("dense_block/dense_block_kernels.h", "conv_backward") in {function[:2] for function in found}
    assert not [function for function in found if function[2] > 8 and function[1] not in registered]
