"""README and docs: the two commands as people type them, links that lead somewhere, every folder named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"]
UP = 'python3 -m venv .venv && .venv/bin/pip install -e ".[all]" && .venv/bin/ganglion up'
TEST = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/pytest'


def test_the_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith(UP) for line in lines) == 1
    assert sum(line.startswith(TEST) for line in lines) == 1


def test_the_readme_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [path.parent.name for path in ROOT.glob("*/ganglion")] + ["bench", "deploy", "tests"]
    for folder in folders:
        assert f"[`{folder}/`]({folder})" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
