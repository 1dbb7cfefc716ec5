# SPDX-License-Identifier: Apache-2.0
"""Native operators refuse what does not fit, whatever it is, before anything is read or written.

Every argument of every operator is changed in turn. A call must raise in the usual words, or in the dispatcher's, or
return what the reference makes of the changed argument; the meta device must agree.
"""

from collections.abc import Iterator

import pytest

from tests.cases.changed_arguments import Caller
from tests.cases.operators import operators


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.stop()


@pytest.mark.parametrize("name", operators())
def test_a_changed_argument_is_refused_or_right(caller, name):
    assert caller.complaints(name) == []
