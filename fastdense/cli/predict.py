# SPDX-License-Identifier: Apache-2.0
"""``fastdense predict``."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastdense._choices import DEVICES, DTYPES
from fastdense._support import InputError, Interrupted, check_output, write_atomically
from fastdense.cli.arguments import MOST_PROCESSES, Commands, add_classifier, add_command, add_threads, count, path
from fastdense.cli.terminal import progress

if TYPE_CHECKING:
    from fastdense.train.prediction import Classifier, Prediction

HELP = """Classify pictures.

Names the likeliest classes of pictures, with probabilities, as CSV or JSON. Checkpoints of fastdense train, folders of
save_pretrained and repositories of the Hugging Face hub know their network, its classes, and size and normalisation of
the pictures. Other weights need --model; they get those of ImageNet, or what timm says of its own.

examples:
  fastdense predict pictures/ --weights runs/train/checkpoint.pt
  fastdense predict a.jpg b.jpg --model densenet121 --weights DEFAULT --top 5
  fastdense predict pictures/ --model densenet121 --weights densenet121.pth --classes names.txt --out classes.json
  fastdense predict pictures/ --model dpn92 --weights timm/dpn92.mx_in1k --size 320 --mean-max

Exit code 1 if a picture could not be read; it is named, and the others are classified. Ctrl-C writes those that are
done.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "predict", HELP, run)
    parser.add_argument("input", nargs="+", type=path, metavar="IN", help="pictures, or folders of them")
    add_classifier(parser)
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="classes per picture (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".csv or .json (default: CSV on standard output)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: that of the weights, or 224)")
    parser.add_argument(
        "--mean-max", action="store_true", help="DPN on larger pictures: mean of average and maximum of all windows"
    )
    parser.add_argument(
        "--workers",
        type=count(MOST_PROCESSES),
        metavar="N",
        help="processes that read (default: up to 4, none for one batch)",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="16-bit types: autocast (default: float32)")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Classifies the pictures and prints or writes the result."""
    from fastdense.train.loop import find_device
    from fastdense.train.prediction import predict
    from fastdense.train.samples import default_workers

    for name in ("top", "batch", "size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"predict: expected --{name} to be at least 1, got {getattr(options, name)}")
    if options.out:
        check_output("predict: expected --out", options.out, (".csv", ".json"))
    device = find_device(options.device, "predict")
    pictures, problems, left_out = find_pictures(options.input)
    classifier = make_classifier(options)
    usual = default_workers() if len(pictures) > options.batch else 0
    workers = usual if options.workers is None else options.workers
    found: list[Prediction] = []
    stop = None
    try:
        with progress("predict", len(pictures)) as tick:
            steps = predict(
                classifier,
                pictures,
                batch=options.batch,
                top=options.top,
                device=str(device),
                dtype=options.dtype,
                workers=workers,
            )
            for one in steps:
                if one.problem:
                    problems.append(one.problem)
                else:
                    found.append(one)
                tick(one.path.name)
    except KeyboardInterrupt:
        if not found:
            raise
        stop = Interrupted(f"stopped; {len(found)} of {len(pictures)} pictures are classified. For all:", resumes=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"predict: cannot classify images of {classifier.size} pixels: {reason}") from error
    is_json = options.out.suffix.lower() == ".json" if options.out else options.json
    text = as_json(found) if is_json else as_csv(found, min(options.top, len(classifier.classes)))
    if options.out:
        write_atomically(options.out, lambda file: file.write(text.encode()))
        print(f"wrote {len(found)} of {len(pictures)} pictures to {options.out}")
    else:
        print(text, end="")
    for line in problems:
        print(f"fastdense: skipped {line}", file=sys.stderr)
    if left_out:
        print(f"fastdense: {left_out}", file=sys.stderr)
    if stop:
        raise stop
    return 1 if problems else 0


def find_pictures(inputs: list[Path]) -> tuple[list[Path], list[str], str | None]:
    """All picture files, what could not be read, and a line about other files of folders."""
    from fastdense.sr.images import search_folder
    from fastdense.sr.images.folders import Found

    every = Found()
    for place in inputs:
        if place.is_dir():
            below = search_folder(place)
            every.pictures += below.pictures
            every.failed += below.failed
            every.others += below.others
        elif place.is_file():
            every.pictures.append(place)
        else:
            raise InputError(f"predict: expected IN to be pictures or folders, got {place}")
    if not every.pictures:
        raise InputError(f"predict: expected IN to hold pictures, got none in {', '.join(map(str, inputs))}")
    return every.pictures, every.failed, every.left_out()


def make_classifier(options: argparse.Namespace) -> Classifier:
    """The network with what the options say of it."""
    import torch

    from fastdense.train.prediction import load_classifier

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.weights is None:
        raise InputError(
            "predict: expected --weights, got none: a checkpoint of fastdense train, a folder of save_pretrained, or"
            " with --model a file, DEFAULT or a name of timm"
        )
    classifier = load_classifier("predict", options.weights, options.model, dict(options.set))
    if options.size:
        classifier = classifier.of_size(options.size)
    if options.classes:
        if not options.classes.is_file():
            raise InputError(f"predict: expected --classes to be a file, got {options.classes}")
        names = tuple(options.classes.read_text().splitlines())
        if len(names) != len(classifier.classes):
            raise InputError(
                f"predict: expected --classes to have {len(classifier.classes)} lines, as many as the network has"
                f" classes, got {len(names)} in {options.classes}"
            )
        classifier = dataclasses.replace(classifier, classes=names)
    if options.mean_max:
        if not hasattr(classifier.model, "test_time_pooling"):
            raise InputError(f"predict: expected --mean-max with a DPN, got {type(classifier.model).__name__}")
        classifier.model.test_time_pooling = True  # type: ignore[assignment]
    return classifier


def as_csv(found: list[Prediction], top: int) -> str:
    """A row a picture: its path, then class and probability for each of the likeliest."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    numbers = [""] if top == 1 else [f"_{rank}" for rank in range(1, top + 1)]
    table.writerow(["file", *(f"{name}{number}" for number in numbers for name in ("class", "probability"))])
    for one in found:
        pairs = zip(one.classes, one.probabilities, strict=True)
        table.writerow([one.path, *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])
    return text.getvalue()


def as_json(found: list[Prediction]) -> str:
    """A list of an object a picture: ``file`` and ``classes``, best first."""
    rows = [
        {
            "file": str(one.path),
            "classes": [
                {"class": name, "probability": value}
                for name, value in zip(one.classes, one.probabilities, strict=True)
            ],
        }
        for one in found
    ]
    return json.dumps(rows, indent=2) + "\n"
