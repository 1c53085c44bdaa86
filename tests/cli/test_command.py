"""The command as a person meets it: quick help, one-line errors, exit codes, a generated page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ganglion.cli.main import app
from ganglion.cli.reference import page
from ganglion.cli.runner import command
from ganglion.wire.errors import DoesNotFit, GanglionError, Unreachable

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "grpc",
    "onnxruntime",
    "torch",
    "numpy",
    "cryptography",
    "google.protobuf",
    "pydantic",
    "httpx",
    "zeroconf",
    "onnx",
    "huggingface_hub",
)


def ganglion(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, "-m", "ganglion.cli", *arguments, "--home", str(home)]
    return subprocess.run(
        command_line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from ganglion.cli.main import app\n"
        "from typer.main import get_command\n"
        "get_command(app).main(['--help'], standalone_mode=False)\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.endswith("LOADED []\n")


def test_every_command_of_the_issue_is_there_with_help() -> None:
    lines = (
        "up", "down", "serve coordinator", "serve agent", "serve gateway", "join", "run", "chat", "pull", "ls", "show",
        "rm", "plan", "ps", "stop",
        "status", "device ls", "device approve", "device rename", "device trust", "device revoke", "token create",
        "token ls", "token revoke", "key create", "key ls", "key revoke",
    )  # fmt: skip
    for line in lines:
        result = CliRunner().invoke(app, [*line.split(), "--help"])
        assert result.exit_code == 0, line
        assert f"Usage: ganglion {line}" in result.output


def test_every_listing_has_json() -> None:
    for line in (
        "ls",
        "show",
        "pull",
        "rm",
        "ps",
        "status",
        "plan",
        "device ls",
        "token ls",
        "token create",
        "key ls",
        "key create",
    ):
        assert "--json" in CliRunner().invoke(app, [*line.split(), "--help"]).output, line


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m ganglion.cli.reference docs/cli.md"


def test_every_exit_code_of_the_error_tree_is_on_the_page() -> None:
    def tree(kind: type[GanglionError]) -> list[type[GanglionError]]:
        return [kind, *(each for child in kind.__subclasses__() for each in tree(child))]

    text = page()
    for kind in tree(GanglionError):
        assert f"| {kind.exit_code} |" in text
        assert f"`{kind.code}`" in text


def test_errors_are_one_line_on_stderr_and_a_code(tmp_path: Path) -> None:
    done = ganglion("ps", home=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no owner key at ")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command_line = [sys.executable, "-m", "ganglion.cli", "--debug", "ps", "--home", str(tmp_path)]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert "error: there is no owner key" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["join", "gj1.nonsense"], 2, "damaged or cut short"),
        (["join", "hello"], 2, "not a join token"),
        (["stop"], 2, "name one model"),
        (["up", "--bind", "here"], 2, "--bind: 'here' is not an IP address"),
        (["up", "--port", "70000"], 2, "--port: Input should be less than or equal to 65535"),
        (["serve", "coordinator"], 3, "ganglion owner init"),
        (["serve", "agent"], 3, "not enrolled"),
        (["down"], 3, "nothing is up"),
        (["key", "create", "Not A Name"], 2, "Not A Name"),
        (["key", "revoke", "nobody"], 3, "nobody"),
        (["run", "demo", "x", "--format", "fp7"], 2, "--format 'fp7'"),
        (["run", "demo", "x", "--mode", "sideways"], 2, "mode"),
        (["run", "demo", "x", "--devices", "a,b", "--shares", "1"], 2, "--shares has 1 numbers for 2 --devices"),
        (["run", "demo", "x", "--shares", "1,b"], 2, "whole numbers with commas"),
        (["unheard-of"], 2, "unheard-of"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = ganglion(*arguments, home=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def scripted(body: object) -> int:
    small = typer.Typer()

    async def act() -> None:
        if isinstance(body, BaseException):
            raise body

    command(small, "act")(act)
    return CliRunner().invoke(small, []).exit_code


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (DoesNotFit("too large"), 6),
        (Unreachable("nobody there"), 7),
        (RuntimeError("a defect"), 70),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("No module named 'httpx'", name="httpx"), 70),
    ],
)
def test_what_a_command_raises_becomes_its_exit_code(raised: object, code: int) -> None:
    assert scripted(raised) == code
