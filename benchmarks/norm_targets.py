# SPDX-License-Identifier: Apache-2.0
"""Measures other norms and activations: ``python -m benchmarks.norm_targets --json FILE``.

MONAI's 3-D DenseNet121 with instance norm and group norm, and torchvision's DenseNet-121 with SiLU and with group norm.
Training steps without the optimizer, plain in both memory formats against "balanced" and "min"; losses must agree
before a figure is believed. What is saved for backward is counted by ``fastdense.report``. Times are taken in turns in
one process, ratios are medians over rounds to the faster plain layout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times, row_of_values, training_step

MODES = ("balanced", "min")


class Case(NamedTuple):
    """A plain network, one image, and the batch of a step."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def _monai(norm: object, act: object) -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2, norm=norm, act=act)


def _torchvision(change: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    import torchvision

    net = torchvision.models.densenet121()
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if (other := change(child)) is not None:
                setattr(parent, name, other)
    return net


def _silu(module: nn.Module) -> nn.Module | None:
    return nn.SiLU() if isinstance(module, nn.ReLU) else None


def _group_norm(module: nn.Module) -> nn.Module | None:
    return nn.GroupNorm(32, module.num_features) if isinstance(module, nn.BatchNorm2d) else None


CASES = {
    "MONAI 3-D, instance norm, ReLU": Case(lambda: _monai("instance", ("relu", {"inplace": True})), (1, 64, 64, 64), 2),
    "MONAI 3-D, instance norm, LeakyReLU": Case(lambda: _monai("instance", "leakyrelu"), (1, 64, 64, 64), 2),
    "MONAI 3-D, group norm, GELU": Case(lambda: _monai(("group", {"num_groups": 8}), "gelu"), (1, 64, 64, 64), 2),
    "DenseNet-121, batch norm, SiLU": Case(lambda: _torchvision(_silu), (3, 224, 224), 4),
    "DenseNet-121, group norm, ReLU": Case(lambda: _torchvision(_group_norm), (3, 224, 224), 4),
}


def make(case: str, memory: str | None, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    net = CASES[case].make().train().to(memory_format=layout)
    return net if memory is None else fastdense.convert(net, memory=memory)


def memory(case: str) -> Row:
    values: dict[str, float] = {}
    for mode in MODES:
        made = fastdense.report(make(case, mode), CASES[case].shape)
        values["plain"] = values["plain-channels-last"] = (made.plain_bytes or 0) / 2**20
        values[mode] = (made.kept_bytes or 0) / 2**20
    return row_of_values(f"{case}, saved for backward, MiB/image", values)


def times(case: str, rounds: int) -> Row:
    x = torch.rand(CASES[case].batch, *CASES[case].shape, generator=torch.Generator().manual_seed(1))
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    runs, losses = {}, {}
    for variant in ("plain", "plain-channels-last", *MODES):
        layout = torch.contiguous_format if variant == "plain" else last
        net = make(case, None if variant.startswith("plain") else variant, layout)
        runs[variant] = training_step(net, x.contiguous(memory_format=layout))
        losses[variant] = runs[variant]()
        check_equal(f"{case} {variant}", losses["plain"], losses[variant], 1e-3)
    return row_of_times(f"{case}, {len(x)} images, ms/step", runs, rounds)


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=tuple(CASES), help="networks; default: all")
    options = parser.parse_args()
    rows = []
    for case in options.only:
        rows += [memory(case), times(case, options.rounds)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
