# SPDX-License-Identifier: Apache-2.0
"""The weights that torchvision publishes for DenseNets, by torchvision's names."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fastdense._support import extra


class PublishedWeights(Enum):
    """Weights with an address, as torchvision's ``WeightsEnum``; the value is the address.

    The file goes to the cache of ``torch.hub``, where torchvision looks for it as well. :meth:`transforms` and
    ``meta`` are torchvision's own and need it; loading does not.
    """

    @property
    def url(self) -> str:
        """Where the file is."""
        return self.value

    @property
    def meta(self) -> dict[str, Any]:
        """What torchvision says of the weights: ``categories``, ``num_params``, accuracies ...

        Raises:
            MissingExtraError: torchvision is not installed.
        """
        return self._torchvision().meta

    def transforms(self, **options: Any) -> Any:
        """What makes an input of a picture: resize to 256, the middle 224 x 224, ImageNet's mean and deviation.

        Args:
            **options: of torchvision's preset, such as ``crop_size`` and ``resize_size``.

        Returns:
            A callable of a PIL image or a tensor ``[..., C, H, W]``, torchvision's preset.

        Raises:
            MissingExtraError: torchvision is not installed.
        """
        return self._torchvision().transforms(**options)

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Tensor]:
        """The entries of the file, from the cache of ``torch.hub`` or downloaded to it; nothing in it is executed.

        Args:
            progress: whether to show the download on standard error.
            check_hash: whether a downloaded file must have the hash in its name.
        """
        return torch.hub.load_state_dict_from_url(
            self.url, map_location="cpu", progress=progress, check_hash=check_hash, weights_only=True
        )

    def _torchvision(self) -> Any:
        with extra("train"):
            from torchvision import models
        return getattr(models, type(self).__name__)[self.name]


class DenseNet121_Weights(PublishedWeights):
    """Weights of DenseNet-121, trained on ImageNet-1k."""

    IMAGENET1K_V1 = "https://download.pytorch.org/models/densenet121-a639ec97.pth"
    DEFAULT = IMAGENET1K_V1


class DenseNet161_Weights(PublishedWeights):
    """Weights of DenseNet-161, trained on ImageNet-1k."""

    IMAGENET1K_V1 = "https://download.pytorch.org/models/densenet161-8d451a50.pth"
    DEFAULT = IMAGENET1K_V1


class DenseNet169_Weights(PublishedWeights):
    """Weights of DenseNet-169, trained on ImageNet-1k."""

    IMAGENET1K_V1 = "https://download.pytorch.org/models/densenet169-b2777c0a.pth"
    DEFAULT = IMAGENET1K_V1


class DenseNet201_Weights(PublishedWeights):
    """Weights of DenseNet-201, trained on ImageNet-1k."""

    IMAGENET1K_V1 = "https://download.pytorch.org/models/densenet201-c1103571.pth"
    DEFAULT = IMAGENET1K_V1
