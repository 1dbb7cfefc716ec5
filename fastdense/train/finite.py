# SPDX-License-Identifier: Apache-2.0
"""What happens where a number becomes infinite or NaN."""

from __future__ import annotations

from torch import nn

from fastdense._support import InputError


class NonFiniteLossError(InputError):
    """The loss or a weight became infinite or NaN; the last checkpoint is from before.

    Args:
        what: got which value, and where.
        lr: the learning rate of the run.
        step: complete steps before.
        saved: those of them that are in the last checkpoint.
        begun: those of them that were in the checkpoint with which the run began.
    """

    def __init__(self, what: str, lr: float, step: int, saved: int, begun: int) -> None:
        if step == 0:
            advice = "No step was made before it, so the weights, the pictures or the dtype are to blame"
        elif saved in (step, begun):  # what was saved leads here at once, or is from before this run
            advice = f"Start anew at a smaller rate: --fresh --lr {lr / 10:.3g}"
        else:
            advice = (
                f"The last checkpoint is from before: continue from step {saved} with --resume --lr {lr / 10:.3g},"
                f" or start anew with --fresh --lr {lr / 10:.3g}"
            )
        super().__init__(f"train: expected a finite {what}. {advice}")


def find_non_finite(model: nn.Module) -> str | None:
    """The name of a weight or running statistic that is infinite or NaN, if there is one."""
    values = model.state_dict().items()
    return next((name for name, value in values if value.is_floating_point() and not value.isfinite().all()), None)
