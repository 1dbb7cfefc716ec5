# SPDX-License-Identifier: Apache-2.0
"""What commands write to the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastdense._support import extra


def console() -> Any:
    """The terminal; wide enough for the table where the output is a file."""
    with extra("cli"):
        from rich.console import Console
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; yields the callback that moves it by one."""
    with extra("cli"):
        from tqdm import tqdm
    with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield tick


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of as many cells each as aligned text; the columns at the numbers in `right` end in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
