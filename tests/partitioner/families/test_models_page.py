"""`docs/models.md` says what the tests run."""

from __future__ import annotations

from pathlib import Path

from models_page import page


def test_the_page_is_fresh():
    written = Path(__file__).parents[3] / "docs" / "models.md"
    assert written.read_text(encoding="utf-8") == page(), "run python tests/models_page.py docs/models.md"
