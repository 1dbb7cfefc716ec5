# SPDX-License-Identifier: Apache-2.0
"""The command line; every command is a thin layer over library functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastdense._support import InputError, MissingExtraError
from fastdense.cli.parser import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: as typed after ``fastdense``; None takes ``sys.argv``.

    Returns:
        0 on success, 1 when the command ran and its result is not what it should be, 2 for input that cannot be used,
        130 when interrupted.
    """
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (InputError, MissingExtraError) as error:
        print(f"fastdense: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no space, too large, no permission ...; the message names the file
        print(f"fastdense: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastdense: interrupted", file=sys.stderr)
        return 130
