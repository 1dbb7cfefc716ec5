# SPDX-License-Identifier: Apache-2.0
"""Training in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdense import models
from fastdense.train import TrainConfig, train
from fastdense.train.processes import Processes
from tests.cases.training import tiny, weights

# No batch statistics, no dropout: both processes together make the step of one. And smooth: where a ReLU or a maximum
# chooses, rounding can change the choice and with it the gradient.
SMOOTH = {"depth": 4, "width": 16, "in_features": 3 * 8 * 8, "activation": "tanh"}


def test_torchrun_trains_as_one_process_does(tmp_path):
    options = {"model": "highway_mlp", "size": 8, "batch": 500, "lr": 0.05, "epochs": 1, "threads": 1}
    train(TrainConfig(**options, model_kwargs=SMOOTH, out=tmp_path / "one"), progress=False)
    root = Path(__file__).parents[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastdense"]
    arguments = [f"--{name}={value}" for name, value in {**options, "out": tmp_path / "two"}.items()]
    arguments += [f"--set={name}={value}" for name, value in SMOOTH.items()]
    together = subprocess.run(
        [*launch, "train", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("test accuracy") == 1
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    # Three steps of 479 images, which two processes cannot halve. Gradients are sums over the images, added up in
    # another order: of n terms, rounding changes a sum by up to n eps of what they would add up to without signs.
    assert one["progress"]["step"] == two["progress"]["step"] == 3
    rounding = 479 * torch.finfo(torch.float32).eps
    pairs = list(zip(one["model"].values(), two["model"].values(), strict=True))
    momenta = [checkpoint["optimizer"]["state"] for checkpoint in (one, two)]
    pairs += [(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0]]
    for alone, shared in pairs:
        assert (alone - shared).abs().max() <= rounding * alone.abs().max()
    losses = [checkpoint["progress"]["history"][0]["loss"] for checkpoint in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=rounding)


def train_here(rank, config, stop_after):
    """Trains in this process's group; ends behind the n-th checkpoint, as if interrupted."""
    checkpoints = 0
    gather = Processes.gather

    def dying_gather(self, value):
        nonlocal checkpoints
        if stop_after is not None and isinstance(value, dict):  # of random states: a checkpoint is being made
            checkpoints += 1
            if checkpoints > stop_after:
                raise KeyboardInterrupt
        return gather(self, value)

    Processes.gather = dying_gather
    try:
        result = train(config, progress=False)
    except KeyboardInterrupt:
        return None
    finally:
        Processes.gather = gather
    return result.test_accuracy, [path.name for path in result.paths]


def test_a_run_of_two_processes_resumes_bit_for_bit(processes, tmp_path):
    fields = {"epochs": 2, "batch": 256, "checkpoint_seconds": 0.0}
    fields["model_kwargs"] = {"depth": 10, "growth_rate": 4, "drop_rate": 0.3}
    through = processes.run(train_here, tiny(tmp_path / "through", **fields), None)
    assert [paths for _, paths in through] == [["checkpoint.pt", "log.csv", "metrics.json", "curves.png"], []]
    assert through[0][0] == through[1][0]
    killed = tiny(tmp_path / "killed", **fields)
    assert processes.run(train_here, killed, 4) == [None, None]
    resumed = tiny(tmp_path / "killed", **fields, resume=True)
    assert processes.run(train_here, resumed, None) == through
    one, two = weights(tmp_path / "through"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def wrap(rank, model):
    return type(Processes(torch.device("cpu")).wrap(model)).__name__


def test_layers_left_out_at_random_are_refused(processes):
    """Processes would wait for gradients that others do not make."""
    for name, arguments, what in (
        ("stochastic_depth_cifar", {"depth": 20}, "ResNet"),
        ("fractalnet", {}, "FractalNet"),
    ):
        model = models.create(name, **arguments)
        assert Processes(torch.device("cpu")).wrap(model) is model
        with pytest.raises(
            pytest.fail.Exception, match=f"train: {what} drops layers at random, which 2 processes do not support"
        ):
            processes.run(wrap, model)
    sampled = models.create("stochastic_depth_cifar", depth=20, mode="sample")
    assert processes.run(wrap, sampled) == ["DistributedDataParallel"] * 2
