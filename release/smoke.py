# SPDX-License-Identifier: Apache-2.0
"""Tries an installed fastdense that has its core dependencies only; run it outside the checkout, by ``python -I``."""

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional

import fastdense
from fastdense import reference
from fastdense.ops import LayerWeights, NormWeights, dense_block


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-m", "fastdense", *arguments], capture_output=True, text=True)


def check_files() -> None:
    """Whole, typed, licensed, nothing of the checkout in it."""
    distribution = importlib.metadata.distribution("fastdense")
    files = {str(path) for path in distribution.files or ()}
    assert Path(fastdense.__file__).is_relative_to(sys.prefix), fastdense.__file__
    assert distribution.version == fastdense.__version__
    assert {
        "fastdense/py.typed",
        "fastdense/_C.pyi",
        "fastdense/cli/commands.py",
        "fastdense/models/catalogue.json",
    } <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    assert Path(fastdense._C.__file__).with_suffix(".json").is_file()
    top = {name.split("/")[0] for name in files if not name.startswith("..")}
    assert top == {"fastdense", f"fastdense-{distribution.version}.dist-info"}, top


def check_imports() -> None:
    """Every module loads without optional packages."""
    for module in pkgutil.walk_packages(fastdense.__path__, "fastdense."):
        if module.name != "fastdense.__main__":
            importlib.import_module(module.name)


def check_numbers() -> None:
    """A block and a resampling against plain PyTorch, in both directions."""
    torch.manual_seed(0)

    def norm(channels: int) -> NormWeights:
        return NormWeights(torch.rand(channels).double(), torch.randn(channels).double(), None, None, 1e-5)

    def conv(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).double()

    widths = (5, 8)
    layers = [LayerWeights(norm(c), conv(4, c, 1, 1), norm(4), conv(3, 4, 3, 3)) for c in widths]
    gradients = []
    for run in (dense_block, reference.dense_block):
        x = torch.linspace(-1, 1, 2 * 5 * 6 * 7).double().reshape(2, 5, 6, 7).requires_grad_()
        out = run(x, layers)[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        gradients += [out.detach(), grad]
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-9, atol=1e-9)

    picture = torch.rand(1, 3, 20, 30, dtype=torch.float64)
    torch.testing.assert_close(
        fastdense.bicubic_resize(picture, scale_factor=2.0),
        functional.interpolate(picture, scale_factor=2.0, mode="bicubic"),
    )


def check_models() -> None:
    """A network learns, and gives the same numbers as its plain modules."""
    net = fastdense.models.create("densenet_cifar", depth=22, num_classes=3)
    pictures, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = functional.cross_entropy(net(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    fused = net.eval()(pictures)
    torch.testing.assert_close(fused, fastdense.restore(net)(pictures), rtol=1e-4, atol=1e-4)


def check_commands() -> None:
    """Help works, so do commands that need no other package; one that does says which."""
    assert "upscale" in command("-h").stdout
    assert command("--version").stdout == f"fastdense {fastdense.__version__}\n"
    assert f"built with torch     {torch.__version__}" in command("info").stdout
    assert "densenet121" in command("models").stdout
    asked = command("bench")
    assert asked.returncode == 2 and "pip install 'fastdense[cli]'" in asked.stderr, asked


def main() -> None:
    for check in (check_files, check_imports, check_numbers, check_models, check_commands):
        check()
        print(f"{check.__name__}: passed")


if __name__ == "__main__":
    main()
