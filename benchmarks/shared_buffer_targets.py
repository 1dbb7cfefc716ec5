# SPDX-License-Identifier: Apache-2.0
"""Measures layers on a shared buffer: ``python -m benchmarks.shared_buffer_targets --json FILE``.

timm's RDNet, torchvision's DenseNet-121 with squeeze-and-excite behind each layer, and pytorchcv's CondenseNet if that
is installed: plain modules in both memory formats, ``torch.utils.checkpoint`` around each layer of a dense block, and
``convert(model, memory="min")``. Training steps without the optimizer; losses must agree before a figure is believed.
Times are taken in turns in one process, ratios are medians over rounds to the faster plain layout. The last lines have
the time of the shared buffer to that of checkpoints in the same memory format. ``--batch`` and ``--size`` make it
quicker.
"""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times, row_of_values, training_step

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
VARIANTS = ("plain", "checkpoint", "min")


class _Excited(nn.Module):
    """A dense layer of torchvision, and squeeze-and-excite on what it makes."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.excite = torchvision.ops.SqueezeExcitation(channels, channels // 4)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.excite(self.layer(features))


def _densenet_se() -> nn.Module:
    net = torchvision.models.densenet121()
    for block in net.features:
        if type(block) is torchvision.models.densenet._DenseBlock:
            for name, layer in list(block.named_children()):
                setattr(block, name, _Excited(layer, 32))
    return net


def _rdnet() -> nn.Module:
    import timm

    return timm.create_model("rdnet_tiny", ls_init_value=1.0)


def _condensenet() -> nn.Module:
    from pytorchcv.models.condensenet import condensenet74_c4_g4

    net = condensenet74_c4_g4()
    for name, buffer in net.named_buffers():
        if name.endswith("index"):
            buffer.copy_(torch.arange(buffer.numel()))
    return net


NETS: dict[str, Callable[[], nn.Module]] = {"rdnet_tiny": _rdnet, "densenet121 with SE": _densenet_se}
if importlib.util.find_spec("pytorchcv"):
    NETS["condensenet74_c4_g4"] = _condensenet


def make(name: str, variant: str, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]().to(memory_format=layout)
    if variant == "min":
        fastdense.convert(net, memory="min")
    if variant == "checkpoint":
        for block in _blocks(net):
            for layer in block.children():
                if layer.state_dict():
                    _put_under_checkpoint(layer)
    return net


def _blocks(net: nn.Module) -> list[nn.Module]:
    return [net.get_submodule(row.name) for row in fastdense.report(net).rows if row.kind == "block"]


def _put_under_checkpoint(layer: Any) -> None:
    forward = layer.forward
    # A list of features grows behind the call: the checkpoint gets them one by one.
    layer.forward = lambda x: (
        checkpoint(lambda *features: forward(list(features)), *x, use_reentrant=False)
        if isinstance(x, list)
        else checkpoint(forward, x, use_reentrant=False)
    )


def memory(name: str, size: int) -> Row:
    made = fastdense.report(make(name, "min"), (3, size, size))
    values = {"plain": made.plain_bytes, "plain-channels-last": made.plain_bytes, "min": made.kept_bytes}
    return row_of_values(f"{name}, saved for backward, MiB/image", {key: (b or 0) / 2**20 for key, b in values.items()})


def times(name: str, batch: int, size: int, rounds: int) -> Row:
    runs, losses = {}, {}
    for layout, memory_format in LAYOUTS.items():
        if name.startswith("condensenet") and layout != "contiguous":
            continue  # its shuffle calls view
        for variant in VARIANTS:
            key = f"{variant}-channels-last" if layout == "channels-last" else variant
            runs[key] = _step(make(name, variant, memory_format), batch, size, memory_format)
            losses[key] = runs[key]()
            check_equal(f"{name} {key}", losses["plain"], losses[key], 1e-3)
    runs.setdefault("plain-channels-last", runs["plain"])
    row = row_of_times(f"{name}, {batch} x {size}^2, ms/step", runs, rounds)
    for layout in ("", "-channels-last"):
        if f"min{layout}" in runs:
            pairs = zip(row["samples"][f"min{layout}"], row["samples"][f"checkpoint{layout}"], strict=True)
            row["ratios"][f"min{layout} to checkpoint"] = statistics.median(ours / theirs for ours, theirs in pairs)
            row["values"][f"min{layout} to checkpoint"] = row["values"][f"min{layout}"]
    return row


def _step(net: nn.Module, batch: int, size: int, layout: torch.memory_format) -> Callable[[], float]:
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    return training_step(net, x)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--only", choices=tuple(NETS), help="measure one network")
    parser.add_argument("--batch", type=int, default=4, help="images of a step; default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="of an image; default: %(default)s")
    options = parser.parse_args()
    rows = []
    for name in [options.only] if options.only else NETS:
        rows += [memory(name, options.size), times(name, options.batch, options.size, options.rounds)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
