# SPDX-License-Identifier: Apache-2.0
"""Trains a model on digits or a folder of pictures. A killed run resumes bit-identically.

Example:
    >>> from fastdense.train import TrainConfig, train
    >>> result = train(TrainConfig(model_kwargs={"depth": 22, "growth_rate": 12}, epochs=10))
"""

from fastdense.train.config import TrainConfig
from fastdense.train.data import Dataset, load
from fastdense.train.finite import NonFiniteLossError
from fastdense.train.loop import TrainResult, train

__all__ = ["Dataset", "NonFiniteLossError", "TrainConfig", "TrainResult", "load", "train"]
