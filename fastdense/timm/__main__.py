# SPDX-License-Identifier: Apache-2.0
"""``python -m fastdense.timm SCRIPT ARGS``: runs a script such as timm's ``train.py`` with this library's models."""

import argparse
import runpy
import sys
from pathlib import Path

from fastdense._choices import DUAL_PATH_MEMORY_MODES

HELP = """Run a script that makes its models by timm, with this library's models.

In the script, timm.create_model knows fastdense_densenet121 and the others. With --convert it converts whatever it
makes; a model without dense or dual path blocks stays as it is, with a warning.

examples:
  python -m fastdense.timm train.py imagenet/ --model fastdense_densenet121 --grad-checkpointing
  python -m fastdense.timm --convert --memory min validate.py imagenet/ --model densenet121 --pretrained
  torchrun --nproc-per-node 2 -m fastdense.timm train.py imagenet/ --model fastdense_dpn92
"""


def main(arguments: list[str]) -> None:
    """Runs the script as ``__main__``, with what stands behind it as its arguments."""
    parser = argparse.ArgumentParser(
        "python -m fastdense.timm", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--convert", action="store_true", help="convert every model that timm.create_model makes")
    parser.add_argument("--memory", choices=DUAL_PATH_MEMORY_MODES, help="memory mode of --convert (default: balanced)")
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="a Python file")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    if not options.script.is_file():
        parser.error(f"expected SCRIPT to be a Python file, got {options.script}")
    if options.memory and not options.convert:
        parser.error("expected --memory with --convert; models of fastdense_ names take it as memory=")

    from fastdense.timm import convert_created_models

    if options.convert:
        convert_created_models(options.memory or "balanced")
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)  # as Python does; it was that of this command
    runpy.run_path(str(options.script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
