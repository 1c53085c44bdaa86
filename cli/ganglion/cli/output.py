"""What a person reads: answers and JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BYTES_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@cache
def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def notes() -> Console:
    """The console on standard error: progress, steps, warnings."""
    return _console(stderr=True)


def say(text: str) -> None:
    """One line on standard error, as plain text."""
    notes().print(text, markup=False)


def step(text: str) -> None:
    """One finished step on standard error."""
    notes().print("[green]✓[/]", end=" ")
    say(text)


def doing(text: str) -> None:
    """One step that has begun, on standard error."""
    notes().print("[cyan]…[/]", end=" ")
    say(text)


def warn(text: str) -> None:
    """One warning on standard error."""
    notes().print("[yellow]![/]", end=" ")
    say(text)


def fail(text: str) -> None:
    """One line that begins with `error:` on standard error."""
    # A process that started this one recognizes the line by how it begins (processes.SAID).
    notes().print("[bold red]error:[/]", end=" ")
    say(text)


def answer(text: str, *, end: str = "\n") -> None:
    """Text that the command was asked for, on standard output, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def answer_json(document: Any) -> None:
    """`document` as JSON on standard output: keys in the order given, which is part of the contract."""
    answer(json.dumps(document, indent=2, ensure_ascii=False))


def answer_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Rows under their columns on standard output; `empty` goes to standard error when there are none."""
    if not rows:
        say(empty)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = _console(stderr=False)
    if out.is_terminal:
        out.print(table)
        return
    widths = [max(len(row[i]) for row in (tuple(columns), *rows)) for i in range(len(columns))]
    for row in (tuple(columns), *rows):
        answer("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def human_bytes(count: int) -> str:
    """`count` bytes in the largest unit that leaves at least one, for example "1.5 GiB"."""
    size = float(count)
    for unit in BYTES_UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {BYTES_UNITS[-1]}"


def pick(document: Mapping[str, Any], *keys: str) -> list[str]:
    """The values of `keys` as cells: an absent or null one is "-"."""
    return ["-" if document.get(key) in (None, "") else str(document[key]) for key in keys]
