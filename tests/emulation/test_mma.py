# SPDX-License-Identifier: Apache-2.0
"""The host twins of cuda/mma.h: fragments in their places, copies in time."""

import ctypes

import pytest
import torch

from tests.emulation.build import HERE, load

FAULTS = ["none", "early read", "misaligned", "other product"]
TYPES = ["bfloat16", "float16", "float32"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = load({HERE / "mma_entry.cpp": None})
    for name in TYPES:
        getattr(library, f"product_{name}").restype = ctypes.c_char_p
    library.round_to_tf32.restype = library.pack_bfloat16.restype = ctypes.c_uint32
    return library


def product(library, name, *, transposed=False, valid=16, fault="none", backwards=False, early=False):
    """What the launch says, its result, and the factors; small integers, which every type holds exactly."""
    dtype = getattr(torch, name)
    depth = 32 // dtype.itemsize
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-8, 9, (n, depth), generator=generator).to(dtype) for n in (16, 8))
    given = right.T.contiguous() if transposed else right
    out = torch.full((16, 8), torch.nan)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (left, given, out)]
    flags = [transposed, valid, FAULTS.index(fault), backwards, early]
    types = [ctypes.c_bool, ctypes.c_int, ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
    run = getattr(library, f"product_{name}")
    reason = run(*pointers, *(t(v) for t, v in zip(types, flags, strict=True))).decode()
    return reason, out, left.double(), right.double()


SCHEDULES = [dict(backwards=b, early=e) for b in (False, True) for e in (False, True)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TYPES)
def test_product(library, name, schedule):
    reason, out, left, right = product(library, name, **schedule)
    assert reason == ""
    assert torch.equal(out.double(), left @ right.T)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TYPES[:2])
def test_transposed_fragments(library, name, schedule):
    reason, out, left, right = product(library, name, transposed=True, **schedule)
    assert reason == ""
    assert torch.equal(out.double(), left @ right.T)


def test_copies_clear_what_does_not_exist(library):
    _, out, left, right = product(library, "float32", valid=8)
    left[:, [2, 3, 6, 7]] = 0
    assert torch.equal(out.double(), left @ right.T)


def test_a_wait_for_too_few_copies_shows(library):
    assert product(library, "bfloat16", fault="early read")[1].isnan().all()


@pytest.mark.parametrize(("fault", "reason"), [("misaligned", "misaligned"), ("other product", "different barriers")])
def test_a_mistake_is_reported(library, fault, reason):
    assert reason in product(library, "bfloat16", fault=fault)[0]
    assert product(library, "bfloat16")[0] == ""  # and does no harm to the next launch


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F800000),
        (1 + 2**-11, 0x3F802000),  # a half, away from zero
        (-1 - 2**-11, 0xBF802000),
        (1 + 2**-11 - 2**-23, 0x3F800000),
        (float("inf"), 0x7F800000),
        (float("nan"), 0x7FFFFFFF),
    ],
)
def test_tf32(library, value, bits):
    assert library.round_to_tf32(ctypes.c_float(value)) == bits


def test_pairs(library):
    assert library.pack_bfloat16(ctypes.c_float(1.0), ctypes.c_float(-2.0)) == 0xC0003F80
