# SPDX-License-Identifier: Apache-2.0
"""Draws docs/bicubic.png: the presets of bicubic_resize on one of scikit-image's photographs."""

from pathlib import Path

import skimage
import torch
from matplotlib.figure import Figure

from fastdense import bicubic_resize
from fastdense.ops.bicubic import PRESETS


def main() -> None:
    photograph = torch.from_numpy(skimage.data.astronaut()[:256, 96:352]).movedim(-1, 0)[None].double() / 255
    reduced = {preset: bicubic_resize(photograph, scale_factor=0.25, preset=preset) for preset in PRESETS}
    figure = Figure(figsize=(2.2 * (len(PRESETS) + 1), 4.6), layout="constrained")
    axes = figure.subplots(2, len(PRESETS) + 1)
    axes[0, 0].imshow(photograph[0].movedim(0, -1))
    axes[0, 0].set_title("photograph", fontsize=9)
    for column, (preset, small) in enumerate(reduced.items(), start=1):
        difference = (small - reduced["matlab"])[0].abs().amax(0)
        axes[0, column].imshow(small[0].movedim(0, -1).clamp(0, 1), interpolation="nearest")
        axes[0, column].set_title(preset, fontsize=9)
        axes[1, column].imshow(difference, vmin=0, vmax=0.25, cmap="magma")
        axes[1, column].set_title(f"largest difference {difference.max():.3f}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_name("bicubic.png"), dpi=110)


if __name__ == "__main__":
    main()
