# SPDX-License-Identifier: Apache-2.0
"""One argument of an operator changed at a time, in every way that somebody may get it wrong."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTS = (-(2**63), -1, 0, 1, 2, 2**31, 2**62, 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 2.0, 1e300, -1e300)
STRINGS = (
    "",
    "nonsense",
    "none",
    "norm",
    "transition",
    "min",
    "reversible",
    "nothing",
    "relu",
    "clamp",
    "drop",
    "last",
)


class Changed(NamedTuple):
    """A changed value; ``same`` means that results must be those of the value before, if there are any."""

    how: str
    value: Any
    same: bool = False


def layouts(t: Tensor) -> Iterator[Changed]:
    """The same numbers, laid out otherwise."""
    yield Changed("contiguous", t.contiguous(), True)
    yield Changed("a part of a larger tensor", torch.stack([t, torch.full_like(t, 77)], -1)[..., 0], True)
    if t.dim() > 1:
        yield Changed("channels innermost", t.movedim(1, -1).contiguous().movedim(-1, 1), True)
        yield Changed("transposed", t.movedim(0, -1).contiguous().movedim(-1, 0), True)
        yield Changed("behind an offset", torch.cat([t[:1], t])[1:], True)
    if t.numel() > 0 and t.is_floating_point():
        yield Changed("negated when it is read", torch._neg_view(-t), True)


def types(t: Tensor) -> Iterator[Changed]:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        if dtype != t.dtype:
            yield Changed(f"as {dtype}", t.to(dtype))
    yield Changed("as complex128", t.to(torch.complex128))


def shapes(t: Tensor) -> Iterator[Changed]:
    yield Changed("with a dimension more in front", t[None])
    yield Changed("with a dimension more behind", t[..., None])
    yield Changed("flat", t.flatten())
    yield Changed("a number", t.new_ones(()))
    yield Changed("[0]", t.new_empty(0))
    yield Changed("[0, 0, 0, 0]", t.new_empty(0, 0, 0, 0))
    for d in range(t.dim()):
        if t.shape[d] > 0:
            yield Changed(f"without the last of dimension {d}", t.narrow(d, 0, t.shape[d] - 1))
            yield Changed(f"with one more in dimension {d}", torch.cat([t, t.narrow(d, 0, 1)], d))
            yield Changed(f"empty in dimension {d}", t.narrow(d, 0, 0))
            yield Changed(f"without dimension {d}", t.select(d, 0))
            yield Changed(f"huge in dimension {d}", t.narrow(d, 0, 1).expand(*t.shape[:d], 2**40, *t.shape[d + 1 :]))


def of_tensor(t: Tensor) -> Iterator[Changed]:
    t = t.detach()
    yield from layouts(t)
    yield from types(t)
    yield from shapes(t)
    yield Changed("on the meta device", t.to("meta"))
    yield Changed("sparse", t.to_sparse())
    yield Changed("None", None)


def of_list(values: Sequence[Any], of_entry: Any, brief: bool) -> Iterator[Changed]:
    values = list(values)
    yield Changed("an empty list", [])
    yield Changed("None", None)
    if not values:
        return
    yield Changed("one entry fewer", values[:-1])
    yield Changed("one entry more", [*values, values[-1]])
    yield Changed("twice as long", values * 2)
    if isinstance(values[0], Tensor | int) and len(set(map(str, values))) > 1:
        yield Changed("in reverse", values[::-1])
    for at, entry in enumerate(values):
        if brief and at not in (0, len(values) - 1):
            continue
        for change in of_entry(entry):
            yield Changed(f"[{at}] {change.how}", [*values[:at], change.value, *values[at + 1 :]], change.same)


def of_number(numbers: Sequence[Any]) -> Any:
    def of(value: Any) -> Iterator[Changed]:
        near = (value - 1, value + 1) if isinstance(value, int) else ()
        for number in (*near, *numbers):
            if number != value and -(2**63) <= (number if isinstance(number, int) else 0) < 2**63:
                yield Changed(f"{number}", number)

    return of


def of_bool(value: bool) -> Iterator[Changed]:
    yield Changed(f"{not value}", not value)


def of_string(value: str) -> Iterator[Changed]:
    for other in STRINGS:
        if other != value:
            yield Changed(repr(other), other)


_BY_TYPE = {
    "Tensor": of_tensor,
    "int": of_number(INTS),
    "SymInt": of_number(INTS),
    "float": of_number(FLOATS),
    "bool": of_bool,
    "str": of_string,
}


def changes(type_name: str, value: Any, like: Tensor, brief: bool = False) -> Iterator[Changed]:
    """All changes of an argument of a schema's type.

    Args:
        like: a tensor to make others of.
        brief: of lists, change the first and the last entry only.
    """
    if type_name.startswith("Optional"):
        inner = type_name[len("Optional[") : -1]
        if value is None:
            yield Changed("a tensor", like)
            yield Changed("a number", like.new_ones(()))
            yield Changed("a seed", torch.tensor(5))
            return
        yield from changes(inner, value, like)
    elif type_name.startswith("List"):
        yield from of_list(value, _BY_TYPE[type_name[len("List[") : -1]], brief)
    else:
        yield from _BY_TYPE[type_name](value)
    if type_name != "str":
        yield Changed("a string", "nonsense")
