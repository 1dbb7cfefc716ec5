# SPDX-License-Identifier: Apache-2.0
"""Norms as training leaves them."""

from torch import nn


def random_norms(model: nn.Module) -> nn.Module:
    """Gives every batch norm random parameters and statistics: with 1 and 0 some gradients vanish but for rounding."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
