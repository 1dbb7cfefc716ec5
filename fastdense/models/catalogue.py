# SPDX-License-Identifier: Apache-2.0
"""Facts about each model: parameters, multiply-adds, memory saved for backward, paper.

Everything is counted on the meta device. ``catalogue.json`` keeps the figures of all models, for ``fastdense
models``; write it again by ``python -m fastdense.models.catalogue``, half a minute, when a model or what it keeps for
backward has changed.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdense import models
from fastdense.fusion.convert import restore
from fastdense.fusion.saved_memory import saved_bytes_per_image

FILE = Path(__file__).with_suffix(".json")


class ModelInfo(NamedTuple):
    """Where a model comes from, and what it is usually fed.

    ``shape`` is that of one image, ``[channels, spatial]``; ``paper`` an arXiv identifier, empty if there is none.
    """

    paper: str
    year: int
    shape: tuple[int, ...]
    kwargs: dict[str, Any]


_IMAGENET, _CIFAR, _MNIST = (3, 224, 224), (3, 32, 32), (1, 28, 28)


_PATCH, _GREY_PATCH = (3, 48, 48), (1, 48, 48)  # of super-resolution, before it is enlarged


CATALOGUE: dict[str, ModelInfo] = {
    "densenet121": ModelInfo("1608.06993", 2017, _IMAGENET, {}),
    "densenet161": ModelInfo("1608.06993", 2017, _IMAGENET, {}),
    "densenet169": ModelInfo("1608.06993", 2017, _IMAGENET, {}),
    "densenet201": ModelInfo("1608.06993", 2017, _IMAGENET, {}),
    "densenet264": ModelInfo("1707.06990", 2017, _IMAGENET, {}),
    "densenet_cifar": ModelInfo("1608.06993", 2017, _CIFAR, {}),
    "drcn": ModelInfo("1511.04491", 2016, _GREY_PATCH, {}),
    "edsr": ModelInfo("1707.02921", 2017, _PATCH, {}),
    "edsr_baseline": ModelInfo("1707.02921", 2017, _PATCH, {}),
    "dpn48b": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn68": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn68b": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn92": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn98": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn107": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "dpn131": ModelInfo("1707.01629", 2017, _IMAGENET, {}),
    "fc_densenet56": ModelInfo("1611.09326", 2017, _IMAGENET, {}),
    "fc_densenet67": ModelInfo("1611.09326", 2017, _IMAGENET, {}),
    "fc_densenet103": ModelInfo("1611.09326", 2017, _IMAGENET, {}),
    "fractalnet": ModelInfo("1605.07648", 2017, _CIFAR, {"drop_path": 0.0, "global_ratio": 0.0}),  # all paths
    "highway_cifar": ModelInfo("1505.00387", 2015, _CIFAR, {}),
    "highway_mlp": ModelInfo("1505.00387", 2015, _MNIST, {}),
    "highway_mnist": ModelInfo("1505.00387", 2015, _MNIST, {}),
    "preresnet_cifar": ModelInfo("1603.05027", 2016, _CIFAR, {}),
    "rdn": ModelInfo("1802.08797", 2018, _PATCH, {}),
    "resnet_cifar": ModelInfo("1512.03385", 2016, _CIFAR, {}),
    "resnet_in_resnet": ModelInfo("1603.08029", 2016, _CIFAR, {}),
    "rrdbnet": ModelInfo("1809.00219", 2018, _PATCH, {}),
    "srcnn": ModelInfo("1501.00092", 2016, _GREY_PATCH, {}),
    "srdensenet": ModelInfo("", 2017, _GREY_PATCH, {}),
    "stochastic_depth_cifar": ModelInfo("1603.09382", 2016, _CIFAR, {"survival": 1.0}),  # all blocks
    "vdsr": ModelInfo("1511.04587", 2016, _GREY_PATCH, {}),
}


class ModelCounts(NamedTuple):
    """Parameters; per image: multiply-adds, and bytes saved for backward by plain modules and by fastdense."""

    parameters: int
    macs: int
    plain_bytes: int
    kept_bytes: int


def count_model(model: nn.Module, shape: tuple[int, ...]) -> ModelCounts:
    """Counts a model; see :class:`ModelCounts`.

    Args:
        model: on the meta device; turned into plain modules.
        shape: of one image, ``[channels, spatial]``.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads triton: too slow for every import of fastdense

    parameters = sum(p.numel() for p in model.parameters())
    kept = saved_bytes_per_image(model, shape)
    restore(model)
    plain = saved_bytes_per_image(model, shape)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    return ModelCounts(parameters, flops.get_total_flops() // 2, plain, kept)


def describe(name: str) -> dict[str, Any]:
    """The entry of a model in ``catalogue.json``: paper, year, shape, and its :class:`ModelCounts` by name."""
    info = CATALOGUE[name]
    with torch.device("meta"):
        model = models.create(name, **info.kwargs)
    counts = count_model(model, info.shape)
    return {"paper": info.paper, "year": info.year, "shape": list(info.shape), **counts._asdict()}


def main() -> None:
    """Writes ``catalogue.json``, a line a model."""
    lines = [f"  {json.dumps(name)}: {json.dumps(describe(name))}" for name in models.list()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
