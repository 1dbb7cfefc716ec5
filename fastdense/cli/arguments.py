# SPDX-License-Identifier: Apache-2.0
"""What commands are told: parsers of option values, and options that several commands share."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterable
from pathlib import Path

from fastdense._choices import DEVICES, DTYPES
from fastdense._support import InputError, extra

# What commands on pictures say of files, in their help.
FILES = """Pictures are turned upright. Types of samples (8 and 16 bits, 32-bit and floating-point TIFF), alpha, frames,
colour profile, EXIF, resolution and text are kept where the format of OUT holds them. A format that cannot hold the
samples is refused. JPEG is written at quality 95, or that of IN where it is higher, without halving colour (4:4:4).
WebP stays lossless where IN is a lossless WebP; else it is written at 95 and halves colour, which is all that lossy
WebP can do. GIF holds 256 colours. With --alpha premultiplied, colours of hidden pixels do not bleed into what is seen.
"""

# Of threads and processes: a typing error must not start a million.
MOST_PROCESSES = 4096

Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], int]


def add_command(commands: Commands, name: str, text: str, run: Run) -> argparse.ArgumentParser:
    """Adds a command; the first line of its help stands in the list of commands."""
    summary = text.strip().partition("\n")[0].rstrip(".")
    parser = commands.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str | None, shown: str, depth: int) -> None:
    """The network to benchmark or train."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=default, metavar="NAME", help=f"model name (default: {shown})")
    model.add_argument("--depth", type=int, default=depth, help="layers of densenet_cifar (default: %(default)s)")
    model.add_argument(
        "--growth-rate", type=int, default=12, metavar="K", help="channels a layer adds, densenet_cifar (default: 12)"
    )
    parser.set_defaults(of_cifar={"depth": depth, "growth_rate": 12})


def check_of_cifar(command: str, options: argparse.Namespace, hint: str = "") -> None:
    """Raises InputError where another model is to have a depth or growth rate that only densenet_cifar takes so."""
    for name, default in options.of_cifar.items():
        given = getattr(options, name)
        if options.model != "densenet_cifar" and given != default:
            option = name.replace("_", "-")
            raise InputError(f"{command}: expected --{option} with --model densenet_cifar, got {options.model}{hint}")


def add_classifier(parser: argparse.ArgumentParser) -> None:
    """The network to use, and its weights."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--weights",
        metavar="W",
        help="checkpoint of fastdense train, folder of save_pretrained or repository of the Hugging Face hub; with "
        "--model a file, DEFAULT (torchvision's), or timm/NAME",
    )
    model.add_argument("--model", metavar="NAME", help="model name, where the weights do not know it")
    model.add_argument(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the model's function, e.g. --set depth=20; may be given again",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where to compute, in which type."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    machine.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="16-bit types mean autocast (default: %(default)s)"
    )
    add_threads(machine)
    machine.add_argument("--seed", type=count(2**63 - 1), default=0, metavar="N", help="default: %(default)s")


def add_threads(parser: argparse._ActionsContainer) -> None:
    """How many threads compute."""
    parser.add_argument(
        "--threads", type=count(MOST_PROCESSES), default=0, metavar="N", help="CPU threads (default: torch's choice)"
    )


def add_pictures(parser: argparse.ArgumentParser, default_alpha: str) -> None:
    """A picture or a folder to read, and where the results go."""
    parser.add_argument("input", type=path, metavar="IN", help="a picture or a folder")
    parser.add_argument("output", type=path, metavar="OUT", help="a picture, or a folder where IN is one")
    parser.add_argument("--resume", action="store_true", help="leave out pictures whose result is in OUT already")
    parser.add_argument("--overwrite", action="store_true", help="replace originals where OUT is IN")
    parser.add_argument(
        "--alpha",
        choices=("premultiplied", "straight"),
        help=f"colours times alpha, or as they are (default: {default_alpha})",
    )
    parser.add_argument("--flatten", type=colour, metavar="COLOUR", help="no alpha: before white, '#20a0ff' ...")
    parser.add_argument("--depth", type=int, choices=(8, 16), help="bits per sample (default: those of IN)")
    parser.add_argument("--frame", type=int, metavar="N", help="of several frames or pages only this one, from 1")
    parser.add_argument("--quality", type=quality, metavar="Q", help="of JPEG, WebP and AVIF, 1 to 100 (default: 95)")


def add_weights(parser: argparse._ActionsContainer) -> None:
    """What weights of other programs do not tell."""
    parser.add_argument("--rgb-range", type=int, choices=(1, 255), help="white inside EDSR and RDN, if unknown")
    parser.add_argument("--res-scale", type=float, metavar="F", help="factor of EDSR's residuals, if unknown")


def path(text: str) -> Path:
    """Parses the name of a file or folder; nothing is no name."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file or a folder, got ''")
    return Path(text)


def colour(text: str) -> tuple[int, int, int]:
    """Parses a colour by its name or as #rrggbb."""
    with extra("cli"):
        from PIL import ImageColor
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a colour like white or #20a0ff, got {text!r}") from error
    return red, green, blue


def count(most: int) -> Callable[[str], int]:
    """A parser of 0, 1, 2 ... up to `most`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)) or int(text) > most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {most}, got {text!r}")
        return int(text)

    return parse


def quality(text: str) -> int:
    """Parses 1 to 100."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"expected a quality from 1 to 100, got {text!r}")
    return int(text)


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
