"""What the quality report is measured on: a text given, or source code of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ganglion.wire.errors import InvalidDocument, InvalidRequest, NotFound

# Plain modules that every version of Python has, of several kinds.
MODULES: Final = ("textwrap.py", "heapq.py", "shlex.py", "statistics.py", "calendar.py", "fractions.py")
TEXT_BYTES: Final = 256 << 20
CHARACTERS_PER_TOKEN: Final = 16  # more text than this a token is not read

Encode = Callable[[str], list[int]]


def default_text() -> str:
    """Source code of a few modules of this Python; raises NotFound where its files are not installed."""
    folder = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in MODULES if not (folder / name).is_file()]
    if missing:
        raise NotFound(f"{folder}: no {missing[0]}, this Python came without its source; give a --text", param="text")
    return "".join((folder / name).read_text(encoding="utf-8") for name in MODULES)


def read_text(path: Path) -> str:
    """A text file as UTF-8; raises NotFound, InvalidDocument naming it."""
    if not path.is_file():
        raise NotFound(f"text: there is no file {path}", param="text")
    if path.stat().st_size > TEXT_BYTES:
        raise InvalidDocument(f"{path}: {path.stat().st_size} bytes, at most {TEXT_BYTES} are accepted", param="text")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidDocument(f"{path}: not UTF-8 at byte {error.start}", param="text") from error


def rows_of_text(
    text: str, encode: Encode, *, first: int | None, tokens: int, row_tokens: int, context: int
) -> list[list[int]]:
    """`text` as rows of at most `row_tokens` tokens (within the `context`), `tokens` in all, each led by `first`.

    Raises InvalidRequest where that leaves nothing to predict.
    """
    led = [] if first is None else [first]
    width = min(row_tokens, context) - len(led)
    ids = encode(text[: tokens * CHARACTERS_PER_TOKEN])[:tokens]
    rows = [led + ids[at : at + width] for at in range(0, len(ids), max(1, width))]
    rows = [row for row in rows if len(row) > 1]
    if width < 1 or not rows:
        raise InvalidRequest(f"text: {len(ids)} tokens in rows of {width} leave nothing to predict", param="text")
    return rows
