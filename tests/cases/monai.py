# SPDX-License-Identifier: Apache-2.0
"""Small DenseNets of MONAI, and what they read."""

import monai.networks.nets.densenet as monai_densenet
import torch
from torch import Tensor, nn

from tests.cases.converted import randomise


def monai_net(dims: int = 3, **options) -> nn.Module:
    sizes = {"growth_rate": 6, "block_config": (2, 3), "init_features": 8}
    return randomise(monai_densenet.DenseNet(dims, 1, 5, **sizes | options).double())


VOLUMES = {1: (2, 1, 400), 2: (2, 1, 48, 40), 3: (2, 1, 24, 20, 28)}


def volume(dims: int) -> Tensor:
    return torch.randn(VOLUMES[dims], dtype=torch.float64)
