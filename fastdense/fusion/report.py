# SPDX-License-Identifier: Apache-2.0
"""What runs fused in a model, what runs plainly, and why."""

import copy
from typing import NamedTuple

from torch import nn

from fastdense.fusion.base import FusedModule
from fastdense.fusion.checks import NotFusible, check_module
from fastdense.fusion.convert import Pattern, find, forget_equivalence_checks, restore
from fastdense.fusion.inferred_layers import count_layers
from fastdense.fusion.saved_memory import saved_bytes_per_image


class ReportRow(NamedTuple):
    """A dense block, transition or dual path block.

    ``runs`` is "fused" or "plain", ``reason`` says why it is plain, ``layers`` counts those of a dense block.
    """

    name: str
    kind: str
    runs: str
    layers: int
    reason: str


class Report(NamedTuple):
    """The rows, and the bytes kept for the backward pass of one image, plainly and as the model is now."""

    rows: tuple[ReportRow, ...]
    plain_bytes: int | None
    kept_bytes: int | None

    @property
    def saved_bytes(self) -> int | None:
        """What the model as it is now keeps less for one image."""
        return None if self.plain_bytes is None or self.kept_bytes is None else self.plain_bytes - self.kept_bytes

    @property
    def kept_ratio(self) -> float | None:
        """Kept to plain: 0.25 where a quarter is kept."""
        return self.kept_bytes / self.plain_bytes if self.plain_bytes and self.kept_bytes is not None else None

    def __str__(self) -> str:
        heads = ("module", "kind", "layers", "runs", "reason")
        cells = [heads] + [(r.name, r.kind, str(r.layers) if r.layers else "", r.runs, r.reason) for r in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.plain_bytes and self.kept_bytes is not None and self.saved_bytes is not None:
            plain, kept, saved = (count / 2**20 for count in (self.plain_bytes, self.kept_bytes, self.saved_bytes))
            lines.append(
                f"kept for the backward pass of one image: {kept:.1f} MiB, plainly {plain:.1f} MiB "
                f"(ratio {self.kept_ratio:.2f}, {saved:.1f} MiB saved)"
            )
        return "\n".join(lines)


def report(model: nn.Module, input_shape: tuple[int, ...] | None = None) -> Report:
    """Lists the dense blocks, transitions and dual path blocks of a model; ``print`` shows it as a table.

    Args:
        model: converted or not; left as it is. A reason is the one of this moment: hooks that are removed or a mode
            that changes later change it.
        input_shape: of one image, ``[channels, spatial]``. With it, the bytes that a training step keeps for its
            backward pass are counted, on a copy without memory.

    Returns:
        The report.

    Raises:
        TypeError: if ``model`` is no module.

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
        kept for the backward pass of one image: ... MiB, plainly ... MiB (ratio 0..., ... MiB saved)
    """
    check_module("report", model)
    rows = [_row(name, module, kind) for name, module, kind in find(model)]
    forget_equivalence_checks(model)
    if input_shape is None:
        return Report(tuple(rows), None, None)
    now = copy.deepcopy(model).to("meta")
    kept = saved_bytes_per_image(now, input_shape)
    return Report(tuple(rows), saved_bytes_per_image(restore(now), input_shape), kept)


def _row(name: str, module: nn.Module, kind: Pattern) -> ReportRow:
    layers = count_layers(module) if kind.name == "block" else 0
    reason = ""
    try:
        kind.read(module)
    except NotFusible as error:
        reason = str(error)
    if not reason and not isinstance(module, FusedModule):
        reason = "not converted: call fastdense.convert(model)"
    if not reason and type(module).forward is not kind.mixin.forward:
        reason = "its class has a forward of its own"
    return ReportRow(name or type(module).__name__, kind.name, "plain" if reason else "fused", layers, reason)
