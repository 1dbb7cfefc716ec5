# SPDX-License-Identifier: Apache-2.0
"""What a worker is asked to do, as one line of JSON."""

from __future__ import annotations

import dataclasses
import json

from fastdense.bench.nets import Net


@dataclasses.dataclass(frozen=True)
class Job:
    """One variant of one network on one batch.

    Attributes:
        net: the network.
        variant: a key of `fastdense.bench.nets.VARIANTS`.
        batch: images per step.
        images: path of an .npy file, float32 [n >= batch, 3, size, size], normalised.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"float32"``, or a 16-bit type for autocast.
        mode: ``"train"`` for whole training steps, ``"eval"`` for forward passes.
        threads: CPU threads; 0 leaves torch's own choice.
        seed: of weights, labels and dropout.
        lr: learning rate of SGD with momentum 0.9.
        settle_steps: steps that a CUDA memory peak leaves out (libraries choose algorithms).
        budget: of tensor memory, for the variant of that name.
        fault: for tests only: ``"loss"``, ``"raise"``, ``"kill"`` or ``"hang"``.
    """

    net: Net
    variant: str
    batch: int
    images: str
    device: str = "cpu"
    dtype: str = "float32"
    mode: str = "train"
    threads: int = 0
    seed: int = 0
    lr: float = 0.01
    settle_steps: int = 1
    budget: str = ""
    fault: str | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        """The inverse of `to_json`."""
        values = json.loads(line)
        return cls(**values | {"net": Net(**values["net"])})
