# SPDX-License-Identifier: Apache-2.0
"""Exports a converted DenseNet to ONNX with a dynamic batch and compares onnxruntime's numbers.

python examples/export.py densenet.onnx
"""

import argparse
from pathlib import Path

import onnxruntime
import torch
import torchvision

import fastdense


def export(out: Path, size: int, small: bool) -> float:
    """Writes the file; returns the largest relative error of three batches."""
    net = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5) if small else torchvision.models.densenet121()
    fastdense.convert(net).eval()
    # An export records the plain modules: the file needs nothing of this library.
    images = torch.randn(2, 3, size, size)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(net, (images,), out, dynamo=True, dynamic_shapes=batch, input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(out)
    errors = []
    for count in (1, 2, 3):
        images = torch.randn(count, 3, size, size)
        with torch.no_grad():
            wanted = net(images)
        (made,) = session.run(None, {"images": images.numpy()})
        errors.append(float((torch.from_numpy(made) - wanted).norm() / wanted.norm()))
        print(f"batch of {count}: relative error {errors[-1]:.1e}")
    return max(errors)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--small", action="store_true", help="a net of a few layers, to try the script")
    return export(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
