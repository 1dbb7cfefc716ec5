# SPDX-License-Identifier: Apache-2.0
"""Trains a converted DenseNet on several processes by DistributedDataParallel, on random pictures.

One machine with two processes (GPUs if there are any, else the CPU):

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Two machines with eight GPUs each; the same command on both, with --node-rank 0 on the first and 1 on the second:

    torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr FIRST --master-port 29500 examples/ddp.py
"""

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastdense


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps to train (20)")
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and step (8)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (64)")
    parser.add_argument("--sync-batch-norm", action="store_true", help="batch statistics of all processes; needs GPUs")
    options = parser.parse_args(arguments)

    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    model = torchvision.models.densenet121(weights=None, num_classes=10).to(device)
    if options.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fastdense.convert(model)  # before or after the line above, and before DistributedDataParallel
    model = DistributedDataParallel(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    torch.manual_seed(dist.get_rank())  # other pictures in every process
    for step in range(options.steps):
        pictures = torch.rand(options.batch, 3, options.size, options.size, device=device)
        labels = (pictures.mean((1, 2, 3)) * 1000).long() % 10
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
