# SPDX-License-Identifier: Apache-2.0
"""Reports which modules of a model run fused, which run plain, and why."""

import copy
from typing import NamedTuple

from torch import nn

from fastdense._choices import SHARED_BUFFER_MODES
from fastdense.fusion.base import FusedModule
from fastdense.fusion.checks import NotFusible, check_module
from fastdense.fusion.convert import Pattern, find, forget_equivalence_checks, restore
from fastdense.fusion.inferred_layers import count_layers
from fastdense.fusion.plan.state import STATE, memory_of, state_of
from fastdense.fusion.saved_memory import check_image_shape, check_not_lazy, saved_bytes_per_image
from fastdense.fusion.shared_buffer.block import SharedBuffer
from fastdense.fusion.shared_buffer.layers import about_shared_buffer
from fastdense.inference import freezable_plans


class ReportRow(NamedTuple):
    """A dense block, transition or dual path block.

    ``runs`` is "fused", "shared buffer" (see :class:`fastdense.nn.SharedBufferBlock`) or "plain", ``reason`` says why
    it is plain, ``layers`` counts those of a dense block, ``frozen_bytes`` what :func:`fastdense.freeze` keeps for it.
    """

    name: str
    kind: str
    runs: str
    layers: int
    reason: str
    frozen_bytes: int = 0


class Report(NamedTuple):
    """The rows, and the bytes saved for backward per image: by plain modules, and by the model as it is now."""

    rows: tuple[ReportRow, ...]
    plain_bytes: int | None
    kept_bytes: int | None

    @property
    def saved_bytes(self) -> int | None:
        """How many bytes fewer the model saves for backward than plain modules, per image."""
        return None if self.plain_bytes is None or self.kept_bytes is None else self.plain_bytes - self.kept_bytes

    @property
    def kept_ratio(self) -> float | None:
        """``kept_bytes / plain_bytes``: 0.25 if a quarter is saved for backward."""
        return self.kept_bytes / self.plain_bytes if self.plain_bytes and self.kept_bytes is not None else None

    def __str__(self) -> str:
        heads: tuple[str, ...] = ("module", "kind", "layers", "runs", "reason")
        cells: list[tuple[str, ...]] = [heads]
        cells += [(r.name, r.kind, str(r.layers) if r.layers else "", r.runs, r.reason) for r in self.rows]
        if any(row.frozen_bytes for row in self.rows):
            frozen = [f"{row.frozen_bytes / 2**20:.1f} MiB" if row.frozen_bytes else "" for row in self.rows]
            cells = [(*row[:-1], more, row[-1]) for row, more in zip(cells, ("frozen", *frozen), strict=True)]
            heads = cells[0]
        widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.plain_bytes and self.kept_bytes is not None and self.saved_bytes is not None:
            plain, kept, saved = (count / 2**20 for count in (self.plain_bytes, self.kept_bytes, self.saved_bytes))
            lines.append(
                f"saved for backward, per image: {kept:.1f} MiB; by plain modules: {plain:.1f} MiB "
                f"(ratio {self.kept_ratio:.2f}, {saved:.1f} MiB less)"
            )
        return "\n".join(lines)


def report(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> Report:
    """Lists the dense blocks, transitions and dual path blocks of a model; ``print`` shows a table.

    Args:
        model: converted or not; it is not changed. Reasons describe the model as it is now; they change with hooks and
            training mode.
        input_shape: of one image, ``[channels, spatial]``. If given, the bytes that a training step saves for backward
            are counted, on a copy on the meta device.

    Returns:
        The report.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: an ``input_shape`` that is no shape, or that the model does not run on.

    Example:
        >>> import fastdense
        >>> print(report(fastdense.models.densenet_cifar(10), (3, 32, 32)))  # doctest: +ELLIPSIS
        module                kind        layers  runs   reason
        --------------------  ----------  ------  -----  ------
        features.denseblock1  block       1       fused
        features.transition1  transition          fused
        features.denseblock2  block       1       fused
        features.transition2  transition          fused
        features.denseblock3  block       1       fused
        saved for backward, per image: ... MiB; by plain modules: ... MiB (ratio 0..., ... MiB less)
    """
    check_module("report", model)
    if input_shape is not None:
        input_shape = check_image_shape("report", input_shape)
        check_not_lazy("report", model)
    frozen = _frozen_bytes(model)
    rows = [_row(name, module, kind, frozen) for name, module, kind in find(model)]
    forget_equivalence_checks(model)
    if input_shape is None:
        return Report(tuple(rows), None, None)
    now = copy.deepcopy(model).to("meta")
    try:
        kept = saved_bytes_per_image(now, input_shape)
        plain = saved_bytes_per_image(restore(now), input_shape)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"report: expected the model to run on input_shape, got {input_shape}: {reason}") from error
    return Report(tuple(rows), plain, kept)


def _frozen_bytes(model: nn.Module) -> dict[int, int]:
    """By the id of a freezer: bytes of the packed weights that a call of the model uses."""
    used = {}
    for plan in freezable_plans(model):
        if plan.freezer is not None and plan.infers and plan.flat is not None:
            used[id(plan.freezer)] = plan.freezer.nbytes(plan.flat)
    return used


def _row(name: str, module: nn.Module, kind: Pattern, frozen: dict[int, int]) -> ReportRow:
    layers = count_layers(module) if kind.name == "block" else 0
    runs = "shared buffer" if isinstance(module, SharedBuffer) else "fused"
    reason = ""
    try:
        kind.read(module)
    except NotFusible as error:
        reason = str(error)
    if reason and kind.shared_reader is not None and isinstance(module, FusedModule):
        why_not_shared, memory = kind.why_not_shared(module), memory_of(module)
        reason = about_shared_buffer(reason, why_not_shared, memory)
        if why_not_shared is None and memory in SHARED_BUFFER_MODES:
            runs, reason = "shared buffer", ""
    if not reason and not isinstance(module, FusedModule):
        reason = "not converted: call fastdense.convert(model)"
    if not reason and type(module).forward is not kind.mixin.forward:
        reason = "its class overrides forward"
    kept = frozen.get(id(state_of(module).freezer), 0) if STATE in module.__dict__ and not reason else 0
    return ReportRow(name or type(module).__name__, kind.name, "plain" if reason else runs, layers, reason, kept)
