# SPDX-License-Identifier: Apache-2.0
"""The highway gate in plain PyTorch."""

import torch

FUNCTIONS = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda v: v}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def reference(x, projection, activation):
    first, second = projection.chunk(2, 1)
    gate = torch.sigmoid(second)
    return gate * FUNCTIONS[activation](first) + (1 - gate) * x
