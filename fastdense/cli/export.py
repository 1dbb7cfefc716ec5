# SPDX-License-Identifier: Apache-2.0
"""``fastdense export``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastdense._support import InputError, check_output, extra, write_atomically
from fastdense.cli.arguments import Commands, add_classifier, add_command
from fastdense.cli.terminal import progress

if TYPE_CHECKING:
    from torch import Tensor

    from fastdense.train.prediction import Classifier

# Largest relative error of the exported network on random images, in float32.
_BOUND = 1e-4

HELP = """Export a classifier to ONNX or torch.export.

Writes a network with its weights as plain operators: the file needs nothing of this library. The number of images is
free, their size is fixed. The result is compared with the network on random images, an ONNX file by onnxruntime where
that is installed. Images go in normalised; the command prints the mean and standard deviation.

examples:
  fastdense export densenet.onnx --weights runs/train/checkpoint.pt
  fastdense export densenet121.onnx --model densenet121 --weights DEFAULT
  fastdense export densenet121.pt2 --model densenet121 --weights timm/densenet121.ra_in1k --size 288

Exit code 1 if the exported network gives other results; the file is then not written.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "export", HELP, run)
    parser.add_argument("output", type=Path, metavar="OUT", help="a file that ends in .onnx or .pt2")
    add_classifier(parser)
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: that of the weights, or 224)")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: torch's choice)")


def run(options: argparse.Namespace) -> int:
    """Exports, compares, then writes."""
    import torch

    from fastdense.train.prediction import load_classifier

    check_output("export: expected OUT", options.output, (".onnx", ".pt2"))
    is_onnx = options.output.suffix.lower() == ".onnx"
    if options.size is not None and options.size < 1:
        raise InputError(f"export: expected --size to be at least 1, got {options.size}")
    if options.opset is not None and not is_onnx:
        raise InputError(f"export: expected --opset with OUT that ends in .onnx, got {options.output}")
    classifier = load_classifier("export", options.weights, options.model, dict(options.set))
    if options.size:
        classifier = classifier.of_size(options.size)
    images = torch.randn(2, 3, classifier.size, classifier.size)
    try:
        with torch.no_grad():
            classifier.model(images)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"export: expected --size to be large enough, got {classifier.size}: {reason}") from error
    with progress("export", 3) as tick:
        content = to_onnx(classifier, images, options.opset) if is_onnx else to_program(classifier, images)
        tick("compare")
        difference = largest_error(classifier, content, is_onnx)
        tick("write")
        if difference is None or difference <= _BOUND:
            write_atomically(options.output, lambda file: file.write(content))
        tick("done")
    if difference is not None and not difference <= _BOUND:
        print(f"expected a relative error of at most {_BOUND:g} of the exported network, got {difference:.1e}")
        return 1
    checked = "not compared: onnxruntime is not installed" if difference is None else f"relative error {difference:.1e}"
    print(f"wrote {options.output} ({checked})")
    if options.weights is None:
        print("its weights are random: no --weights were given")
    print(f"input: float32 [N, 3, {classifier.size}, {classifier.size}], output: logits [N, {len(classifier.classes)}]")
    shown = [", ".join(f"{value:g}" for value in values) for values in (classifier.mean, classifier.std)]
    print(f"normalise pixels in [0, 1] by mean {shown[0]} and standard deviation {shown[1]}")
    return 0


def to_onnx(classifier: Classifier, images: Tensor, opset: int | None) -> bytes:
    """An ONNX file with input "images" and output "logits"."""
    import torch

    with extra("export"):
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            classifier.model,
            (images,),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
        made = next(o.version for o in onnx.load(path).opset_import if o.domain == "")
        if opset is not None and made != opset:
            raise InputError(
                "export: expected --opset to be one that torch can write for this network, "
                f"got {opset}: it wrote {made}"
            )
        return path.read_bytes()


def to_program(classifier: Classifier, images: Tensor) -> bytes:
    """A file that ``torch.export.load`` reads."""
    import torch

    with _quiet():
        program = torch.export.export(classifier.model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program = program.run_decompositions({})
        file = io.BytesIO()
        torch.export.save(program, file)
    return file.getvalue()


def largest_error(classifier: Classifier, content: bytes, is_onnx: bool) -> float | None:
    """Relative to the network's logits, of one and three random images; None where onnxruntime is missing."""
    import torch

    if is_onnx:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            return None
        session = onnxruntime.InferenceSession(content)
    else:
        module = torch.export.load(io.BytesIO(content)).module()
    errors = []
    for count in (1, 3):
        images = torch.randn(count, 3, classifier.size, classifier.size)
        with torch.no_grad():
            wanted = classifier.model(images)
            made = torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) if is_onnx else module(images)
        errors.append(float((made - wanted).norm() / wanted.norm()))
    return max(errors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of torch's exporters, which are about torch itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
