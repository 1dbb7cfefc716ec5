# SPDX-License-Identifier: Apache-2.0
"""The command line; every command is a thin layer over library functions."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

from fastdense._build_info import ExtensionError
from fastdense._support import InputError, Interrupted, MissingExtraError
from fastdense.cli.commands import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: as typed after ``fastdense``; None takes ``sys.argv``.

    Returns:
        0 on success; 1 if the command ran, but its result is not as expected; 2 for input that cannot be used; 130 if
        interrupted.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    _complete(parser)
    options = parser.parse_args(typed)
    try:
        return options.run(options)
    except (InputError, MissingExtraError, ExtensionError) as error:
        print(f"fastdense: {str(error).removeprefix('fastdense: ')}", file=sys.stderr)
        return 2
    except OSError as error:  # no space, too large, no permission ...; the message names the file
        print(f"fastdense: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"\nfastdense: {stop}\n    {_command_after(stop, typed)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nfastdense: interrupted", file=sys.stderr)
        return 130


def _command_after(stop: Interrupted, typed: list[str]) -> str:
    """The command that was typed, so that it goes on where it stopped or starts again."""
    if stop.resumes:
        typed = [word for word in typed if len(word) < 3 or not "--fresh".startswith(word)]
        typed += [] if "--resume" in typed else ["--resume"]
    return shlex.join(["fastdense", *typed])


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell that asks for completions, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ModuleNotFoundError):
            import argcomplete

            argcomplete.autocomplete(parser)
