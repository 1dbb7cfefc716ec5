# SPDX-License-Identifier: Apache-2.0
"""``make mutants`` is long; that what it looks for is still in the sources is seen here."""

from pathlib import Path

import pytest

from tests.mutants import CUDA_MUTANTS, MUTANTS

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in MUTANTS + CUDA_MUTANTS}))
def test_planted_mistakes_find_their_place(name):
    """Once: a second place would be changed along with the first."""
    text = (CSRC / name).read_text()
    texts = {before for file, before, _ in MUTANTS + CUDA_MUTANTS if file == name}
    assert {before: text.count(before) for before in texts} == dict.fromkeys(texts, 1)


def test_planted_mistakes_are_mistakes():
    planted = MUTANTS + CUDA_MUTANTS
    assert all(before != after for _, before, after in planted)
    assert len(set(planted)) == len(planted)
