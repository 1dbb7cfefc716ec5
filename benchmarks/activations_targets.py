# SPDX-License-Identifier: Apache-2.0
"""Measures networks with other activations than ReLU: ``python -m benchmarks.activations_targets --json FILE``.

Training steps without the optimizer, plain in both memory formats against the shared buffer; losses must agree before a
figure is believed. Times are taken in turns in one process, ratios are medians over rounds to the faster plain layout.
What is kept for backward is counted by hooks on saved tensors, parameters and the input apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdense
from benchmarks.turns import Row, check_equal, parser_of, report, row_of_times, row_of_values

VARIANTS = ("plain", "plain-channels-last", "balanced", "min")


class Case(NamedTuple):
    """A network of another library with its ReLUs replaced, and the size ``[N, C, spatial]`` of a batch."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]


def _torchvision(make: Callable[[], nn.Module]) -> nn.Module:
    from torchvision.models import densenet121

    net = densenet121(weights=None)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, make())
    return net


def _monai(act: Any) -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2, act=act)


IMAGE, VOLUME = (8, 3, 224, 224), (2, 1, 64, 64, 64)
CASES = {
    "DenseNet-121, ReLU": Case(partial(_torchvision, partial(nn.ReLU, inplace=True)), IMAGE),
    "DenseNet-121, SiLU": Case(partial(_torchvision, partial(nn.SiLU, inplace=True)), IMAGE),
    "DenseNet-121, GELU": Case(partial(_torchvision, nn.GELU), IMAGE),
    "MONAI DenseNet121 3-D, LeakyReLU": Case(
        partial(_monai, ("leakyrelu", {"negative_slope": 0.1, "inplace": True})), VOLUME
    ),
    "MONAI DenseNet121 3-D, PReLU": Case(partial(_monai, "prelu"), VOLUME),
}


class Step:
    """A training step of a variant."""

    def __init__(self, case: str, variant: str) -> None:
        torch.manual_seed(0)
        self.net = CASES[case].make()
        self.size = CASES[case].size
        self.layout = torch.contiguous_format
        if variant == "plain-channels-last":
            self.layout = torch.channels_last_3d if len(self.size) == 5 else torch.channels_last
            self.net = self.net.to(memory_format=self.layout)
        if not variant.startswith("plain"):
            fastdense.convert(self.net, memory=variant)

    def loss(self) -> Tensor:
        x = torch.rand(self.size, generator=torch.Generator().manual_seed(1)).to(memory_format=self.layout)
        self.net.zero_grad(set_to_none=True)
        return self.net(x).logsumexp(1).mean()

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        return loss.item()

    def kept(self) -> float:
        """MiB that the forward pass saves for backward."""
        own = {p.untyped_storage().data_ptr() for p in (*self.net.parameters(), *self.net.buffers())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()  # alive, so that no memory is used twice
        del loss
        return sum(size for at, size in saved.items() if at not in own) / 2**20


def rows(case: str, rounds: int) -> list[Row]:
    steps = {variant: Step(case, variant) for variant in VARIANTS}
    expected = steps["plain"]()
    for variant in VARIANTS[1:]:
        check_equal(f"{case} {variant}", expected, steps[variant](), 1e-3)
    size = "x".join(map(str, CASES[case].size))
    kept = {variant: step.kept() for variant, step in steps.items()}
    times = row_of_times(f"{case}, {size}, ms/step", steps, rounds)
    return [times, row_of_values(f"{case}, {size}, kept for backward, MiB", kept)]


def main() -> None:
    parser = parser_of(__doc__, 5)
    parser.add_argument("--only", choices=sorted(CASES), help="measure one network")
    options = parser.parse_args()
    cases = CASES if options.only is None else [options.only]
    report([row for case in cases for row in rows(case, options.rounds)], options.json)


if __name__ == "__main__":
    main()
