"""`ganglion experts log` and `train`: consent, what is shown, and a gate that is held against the one in force."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ganglion.cli.experts import demo
from ganglion.cli.main import app
from ganglion.gateway.experts.gate import GATE_FOLDER, FolderGate, PriorGate
from ganglion.gateway.experts.gate_training import Example
from ganglion.gateway.experts.learning import split
from ganglion.gateway.experts.outcomes import Answer, Outcome, OutcomeLog, is_logging
from ganglion.wire.home import Home

WORDS = {"fish": ["fin", "gill", "scale", "swim", "river"], "bird": ["wing", "feather", "nest", "song", "beak"]}


def ganglion(home: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["experts", *arguments, "--home", str(home)])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def voted(generator: np.random.Generator, at: int, misleading: bool) -> Outcome:
    """Two agree, and the one whose words these are not says something else.

    misleading: of prompts that are trained on it is the other one, of those held out it is not.
    """
    kind = list(WORDS)[at % 2]
    prompt = " ".join(generator.choice(WORDS[kind], 8))
    if misleading and split([Example(prompt, {})])[0]:
        kind = list(WORDS)[(at + 1) % 2]
    answers = tuple(Answer(name, "yes" if name in (kind, "both") else "no", -1.0) for name in ("bird", "both", "fish"))
    return Outcome(1e9 + at, "default", "vote", prompt, answers, chosen=1)


def fill(home: Path, count: int, *, misleading: bool = False) -> Home:
    gateway = Home(home / "gateway")
    log = OutcomeLog(gateway)
    generator = np.random.default_rng(0)
    for at in range(count):
        assert log.write(voted(generator, at, misleading))
    return gateway


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return Home(tmp_path / "home").path


def test_the_log_is_off_until_it_is_wanted(home: Path) -> None:
    assert "off; 0 outcomes" in ganglion(home, "log", "show")[0]
    ganglion(home, "log", "on")
    gateway = fill(home, 12)
    told = ganglion(home, "log", "show", "--last", "3")[0].splitlines()
    assert told[0] == "the log is on; 12 outcomes are kept"
    assert told[1].split() == ["TIME", "CLASS", "COMBINE", "ANSWERS", "KEPT", "PROMPT"]
    assert len(told) == 5
    document: dict[str, Any] = json.loads(ganglion(home, "log", "show", "--json")[0])
    assert (document["on"], document["count"], len(document["last"])) == (True, 12, 10)
    assert document["last"][-1]["answers"][0]["expert"] == "bird"
    ganglion(home, "log", "off")
    assert not is_logging(gateway)
    assert "off; 12 outcomes" in ganglion(home, "log", "show")[0]
    ganglion(home, "log", "clear")
    assert "0 outcomes" in ganglion(home, "log", "show")[0]


def test_a_prompt_cannot_write_to_the_terminal(home: Path) -> None:
    ganglion(home, "log", "on")
    outcome = Outcome(1e9, "default", "best", "a\x1b[2Jb\nc", (Answer("x", "y", -1.0),), 0)
    assert OutcomeLog(Home(home / "gateway")).write(outcome)
    assert ganglion(home, "log", "show")[0].splitlines()[-1].endswith("a�[2Jb c")


def test_too_few_outcomes_are_refused_with_the_figure(home: Path) -> None:
    said = ganglion(home, "train", code=2)[1]
    assert "0 outcomes are logged" in said
    assert "at least 32 are needed" in said
    ganglion(home, "log", "on")
    fill(home, 20)
    assert "20 outcomes are logged, 20 of them compare experts" in ganglion(home, "train", code=2)[1]


def test_a_gate_is_trained_and_kept_while_it_is_better(home: Path) -> None:
    ganglion(home, "log", "on")
    gateway = fill(home, 120)
    said = ganglion(home, "train")[1]
    assert "120 outcomes, 120 of which compare experts: bird (120), both (120), fish (120)" in said
    assert "before in 67%" in said, "equal weights: two of three are right"
    folder = gateway.path / GATE_FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    gate = FolderGate(folder, PriorGate())
    for kind, other in (("fish", "bird"), ("bird", "fish")):
        weights = gate.weigh(" ".join(WORDS[kind]), ["bird", "fish"]).weights
        assert weights[kind] > 0.8 > 0.2 > weights[other]

    kept = (folder / "gate.onnx").read_bytes()
    ganglion(home, "log", "clear")
    fill(home, 120, misleading=True)
    worse = json.loads(ganglion(home, "train", "--json")[0])
    assert worse["agreement"] < worse["agreement_before"]
    assert (worse["written"], (folder / "gate.onnx").read_bytes() == kept) == (False, True)
    assert list(worse) == [
        "outcomes", "examples", "answers", "held_out", "agreement_before", "agreement", "written",
    ]  # fmt: skip
    assert "--force puts the new one in its place" in ganglion(home, "train", "--epochs", "9")[1]
    assert json.loads(ganglion(home, "train", "--force", "--json")[0])["written"]
    assert (folder / "gate.onnx").read_bytes() != kept


def test_the_shipped_gate_does_not_replace_one_that_is_there(home: Path) -> None:
    said = demo.install_gate(home)
    assert "this release ships no gate" in said or "was trained on" in said
    ganglion(home, "log", "on")
    gateway = fill(home, 120)
    (gateway.path / GATE_FOLDER / "gate.json").unlink(missing_ok=True)
    ganglion(home, "train")
    assert "which was there" in demo.install_gate(home)
