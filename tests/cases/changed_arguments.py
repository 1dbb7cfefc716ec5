# SPDX-License-Identifier: Apache-2.0
"""Calls of a native operator with one argument changed, in a process that may die of it."""

import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cases.forks import forking
from tests.cases.mutations import Changed, changes
from tests.cases.operator_oracle import expected
from tests.cases.operators import samples

OURS = re.compile(r"\w+: expected .+, got", re.DOTALL)
# The dispatcher's and the allocator's words, before an operator is reached, or for results that no memory holds.
TORCHS = re.compile(
    r"expected (at most|a value of type|a proper)|could not run '|not enough memory|can't allocate memory|"
    r"storage size calculation overflowed|value out of range|incompatible|unable to cast|overflow|"
    r"not implemented for|sparse|there were no tensor arguments|doesn't currently support mutable",
    re.IGNORECASE,
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1, torch.uint8: 2e-2}
EXTRA_MEMORY = 6 << 30


def run(name: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The results; of an operator that returns nothing, the tensors that it writes."""
    op = getattr(torch.ops.fastdense, name).default
    returned = op(*arguments)
    if returned is None:
        return [t for values in arguments[:3] for t in values]
    return list(returned) if isinstance(returned, list | tuple) else [returned]


def copied(arguments: Sequence[Any], device: str | None = None) -> list[Any]:
    """With the strides of the originals, which an operator may write to."""

    def copy(value: Any) -> Any:
        if isinstance(value, list | tuple):  # here pytree would take as long as all calls
            return type(value)(map(copy, value))
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        if device == "meta":
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        value = value.detach()
        if value.is_meta or value.is_neg() or 0 in value.stride():  # cannot be written to
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

    return [copy(value) for value in arguments]


def tensors_of(value: Any) -> list[Tensor]:
    """Those of lists in lists."""
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    return [value] if isinstance(value, Tensor) else []


def refusal(error: Exception) -> str | None:
    """What is wrong with an error, if anything."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ValueError | TypeError) and OURS.match(str(error)):
        return None
    if isinstance(error, RuntimeError | TypeError | ValueError) and TORCHS.search(str(error)):
        return None
    return f"raises {text[:300]}"


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor | None], change: Any = None) -> str | None:
    """What is wrong with results; a changed argument of a narrow type has been rounded."""
    rounded = [t.dtype for t in tensors_of(change)]
    for at, (f, w) in enumerate(zip(found, wanted, strict=True)):
        if w is None:
            continue
        if f.shape != w.shape:
            return f"result {at} has shape {list(f.shape)}, not {list(w.shape)}"
        x, y = f.double(), w.double()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return f"result {at} is not finite elsewhere"
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        error = ((x - y).norm() / y.norm().clamp_min(1e-3)).item()
        if error > max(TOLERANCE.get(dtype, 0) for dtype in (f.dtype, *rounded)):
            return f"result {at} is wrong by {error:.1e}"
    return None


def on_meta(name: str, arguments: Sequence[Any], found: Sequence[Tensor] | None) -> str | None:
    """Whether the meta device refuses the arguments too, or promises what was returned."""
    try:
        promised = run(name, copied(arguments, "meta"))
    except Exception as error:
        return None if found is None else f"meta: {refusal(error) or error}"
    if found is None:
        return "meta: does not refuse it"
    for at, (f, p) in enumerate(zip(found, promised, strict=True)):
        if (f.shape, f.dtype) != (p.shape, p.dtype) or (f.numel() > 0 and f.stride() != p.stride()):
            made = [(list(t.shape), t.stride(), t.dtype) for t in (p, f)]
            return f"meta: result {at} is {made[0]}, not {made[1]}"
    return None


def belongs_to_what_is_kept(argument: str, before: Any, change: Changed) -> bool | None:
    """Whether a change that a backward operator takes is one that it cannot tell from another forward pass.

    None for changes after which gradients are those of the reference.
    """
    if change.how.endswith(("] as torch.bfloat16", "] as torch.float16")):  # other ReLUs pass with rounded weights
        return True
    if argument == "needs_grad" or change.how.startswith("as ") or "] as " in change.how:
        return None
    if argument == "seed" and change.value is not None:  # other dropout masks
        return True
    if change.value is None or (isinstance(before, Tensor) and change.value.shape == before.shape):
        return None
    if isinstance(before, Tensor) and change.value.shape[:1] == (0,):  # absent, to be made again
        return None
    # As many windows may fit into another input.
    return not isinstance(before, Tensor) or argument == "input"


def complaint(name: str, arguments: Sequence[Any], at: int, change: Changed, before: list[Tensor]) -> str | None:
    """What is wrong with the call whose argument number ``at`` is changed."""
    changed = [*arguments[:at], change.value, *arguments[at + 1 :]]
    on_cpu = "meta" not in change.how
    try:
        found = run(name, copied(changed))
    except Exception as error:
        wrong = refusal(error)
        if wrong is None and on_cpu and not re.search("memory|overflow|mutable", str(error)):
            wrong = on_meta(name, changed, None)
        return wrong
    tensors = [t for t in tensors_of(changed) if t.numel() > 0]
    if any(t.is_meta for t in found) and not all(t.is_meta for t in tensors):
        return "returns tensors without memory"
    wrong = on_meta(name, changed, found)
    if wrong is not None or any(t.is_meta for t in found) or "e+300" in change.how:  # whose products overflow
        return wrong
    schema = getattr(torch.ops.fastdense, name).default._schema
    if schema.arguments[at].name == "eps" and change.how.endswith(
        " 0.0"
    ):  # zeros over zeros where channels are constant
        return None
    if change.same:
        return difference(found, before)
    if name.endswith("_backward") and name != "_bicubic_backward":  # whose input is its gradient alone
        argument = getattr(torch.ops.fastdense, name).default._schema.arguments[at].name
        kept = belongs_to_what_is_kept(argument, arguments[at], change)
        if kept is not None:
            return None if kept else "is taken for valid in another shape"
    try:
        wanted = expected(name, copied(changed))
    except Exception as error:
        if all(t.numel() == 0 for t in found):
            return None
        return f"is taken for valid; the reference raises {type(error).__name__}: {str(error)[:200]}"
    return difference(found, wanted, change.value)


def steps(name: str) -> Iterator[tuple[str, str | None]]:
    """Descriptions of all calls, each before it is made with nothing, and after it with what is wrong."""
    schema = getattr(torch.ops.fastdense, name).default._schema
    for number, sample in enumerate(samples(name)):
        arguments = copied(sample)
        tensors = tensors_of(arguments)
        with torch.no_grad():
            before = run(name, copied(arguments))
            yield f"sample {number}", difference(before, expected(name, copied(arguments)))
            for at, argument in enumerate(schema.arguments):
                for change in changes(str(argument.type), arguments[at], tensors[0], brief=number > 0):
                    step = f"sample {number}, {argument.name} {change.how}"
                    yield step, None
                    yield step, complaint(name, arguments, at, change, before)


def limit_memory() -> None:
    """Makes results that are far too large an error rather than a machine that swaps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_MEMORY, resource.RLIM_INFINITY))


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    torch.set_printoptions(threshold=0, edgeitems=1)  # the dispatcher's errors have all tensors in them
    limit_memory()
    while True:
        torch.manual_seed(0)
        for step in steps(connection.recv()):
            connection.send(step)
        connection.send(None)


class Caller:
    """A process that makes the calls; a new one where the last has died."""

    def __init__(self) -> None:
        self.process: Any = None

    def complaints(self, name: str) -> list[str]:
        """What is wrong with an operator; the last entry is the call that ended the process, if one did."""
        if self.process is None:
            context = forking()
            self.connection, there = context.Pipe()
            self.process = context.Process(target=_serve, args=(there,), daemon=True)
            self.process.start()
            there.close()
        self.connection.send(name)
        wrong, last = [], ""
        try:
            while (step := self.connection.recv()) is not None:
                last = step[0]
                if step[1] is not None:
                    wrong.append(f"{last}: {step[1]}")
        except EOFError:
            self.process.join()
            wrong.append(f"{last}: the process ended with {self.process.exitcode}")
            self.process = None
        return wrong

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.join()
