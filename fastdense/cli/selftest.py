# SPDX-License-Identifier: Apache-2.0
"""``fastdense selftest``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from fastdense._choices import DEVICES
from fastdense._support import InputError, check_output, write_json
from fastdense.cli.arguments import Commands, add_command
from fastdense.cli.terminal import columns

HELP = """Check on this machine that operators and networks give the numbers of plain PyTorch.

Takes less than a minute. Every operator and family of networks is compared with plain PyTorch, in float64 and in the
types that people use, by every variant of the kernels that this machine can run. Each check runs twice and must give
the same bits. What fails names the environment variable that avoids it.

examples:
  fastdense selftest
  fastdense selftest --device cuda --json

Exit code 1 if a check failed.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "selftest", HELP, run)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON, a row a check, or write it beside the table"
    )
    parser.add_argument("--verbose", action="store_true", help="a line on stderr before and after each check")


def run(options: argparse.Namespace) -> int:
    """Prints a line for each operator and network, then what failed."""
    from fastdense import selftest

    if options.json and options.json != "-":
        check_output("selftest: expected --json", Path(options.json))
    checks: list[selftest.Check] = []
    is_terminal = False
    with contextlib.suppress(OSError):
        is_terminal = sys.stderr.isatty()

    def started(what: str) -> None:
        if options.verbose:
            print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
        elif is_terminal:
            print(f"\r\033[K{len(checks) + 1}: {what}", end="", file=sys.stderr, flush=True)

    try:
        for check in selftest.run(options.device, started):
            checks.append(check)
            if options.verbose:
                print(f"{check.problem or 'ok'} ({check.seconds:.1f} s)", file=sys.stderr, flush=True)
    except ValueError as error:
        raise InputError(str(error)) from error
    finally:
        if checks and is_terminal and not options.verbose:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    failed = [check for check in checks if not check.ok]
    if options.json:
        found = [{**check._asdict(), "ok": check.ok} for check in checks]
        if options.json == "-":
            print(json.dumps(found, indent=2))
            return 1 if failed else 0
        write_json(Path(options.json), found)
    rows = [("what", "checks", "largest error / bound", "seconds", "")]
    for name in dict.fromkeys(check.name for check in checks):
        of_name = [check for check in checks if check.name == name]
        ratios = [check.error / check.bound if check.bound else check.error for check in of_name]
        wrong = sum(not check.ok for check in of_name)
        seconds = sum(check.seconds for check in of_name)
        rows.append(
            (name, str(len(of_name)), f"{max(ratios):.2g}", f"{seconds:.1f}", f"{wrong} FAILED" if wrong else "ok")
        )
    print(columns(rows, right=(1, 2, 3)))
    for check in failed:
        print(f"FAILED {check.name}, {check.dtype}, {check.kernels}: {check.problem}")
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed on {options.device}")
    return 1 if failed else 0
