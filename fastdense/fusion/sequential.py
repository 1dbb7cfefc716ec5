# SPDX-License-Identifier: Apache-2.0
"""The mixin that runs each dense block of a sequence together with what follows it."""

from torch import Tensor

from fastdense.fusion.base import FusedModule, check_runs_here, is_traced
from fastdense.fusion.batch_statistics import group_name, process_group_of, update_norms
from fastdense.fusion.checks import NotFusible
from fastdense.fusion.dense_layers import norm_weights
from fastdense.fusion.max_pool_transition import run_recomputed
from fastdense.fusion.stem import Stem, read_stem
from fastdense.ops import norm_relu_max_pool
from fastdense.ops.arguments import count_pixels


def run_stem(stem: Stem, input: Tensor) -> Tensor:
    """One operator call for a norm, ReLU and max pool, where it knows the pool; else they are run again in backward."""
    try:
        check_runs_here("norm_relu_max_pool", input)
        group = process_group_of([stem.norm])
        if stem.pool is None or not stem.takes(input):
            raise NotFusible("the operator knows no such pool or mix of types")
        if input.numel() == 0 and group is None:
            raise NotFusible("a batch of nothing has no statistics")
    except NotFusible:
        return run_recomputed(stem.modules, input)
    out, statistics = norm_relu_max_pool(input, norm_weights(stem.norm), *stem.pool, process_group=group_name(group))
    update_norms([(stem.norm, 0)], statistics, count_pixels(input), group)
    return out


class FusedSequential(FusedModule):
    """A sequence in which modules that belong together run as one operator.

    A dense block runs with the transition or norm behind it: the norm's statistics are those of the block, its gradient
    joins the block's, and no feature map of the block's size is made twice. Dual path blocks in a row run as a stage,
    blocks of SRDenseNet in a row on one buffer. So do the norm, ReLU and max pool of a stem. Modules with hooks run one
    by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return self.plain_forward(input)
        modules = list(self.__dict__["_modules"].values())
        at = 0
        while at < len(modules):
            module = modules[at]
            run = module.fused_run(modules[at + 1 :]) if isinstance(module, FusedModule) else None
            if run is not None:
                try:
                    input = run.call(input)
                    at += run.modules
                    continue
                except NotFusible:
                    pass  # one by one; they fall back, with their own warnings
            stem = read_stem(modules[at:])
            if stem is not None:
                input = run_stem(stem, input)
                at += len(stem.modules)
                continue
            input = module(input)
            at += 1
        return input
