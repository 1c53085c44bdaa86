"""`ganglion experts key`: from standard input into the gateway's home, never by an argument."""

from __future__ import annotations

import stat
from pathlib import Path

import typer
from typer.testing import CliRunner

from ganglion.cli.experts import keys
from ganglion.gateway.experts.servers import Server, list_servers
from ganglion.wire.home import Home


def ganglion(home: Path, *arguments: str, said: str = "") -> tuple[int, str]:
    app = typer.Typer()
    app.callback()(lambda: None)
    keys.add_to(app)
    done = CliRunner().invoke(app, ["key", *arguments, "--home", str(home)], input=said)
    return done.exit_code, done.output + (done.stderr if done.stderr_bytes else "")


def test_a_key_is_read_from_standard_input(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, said = ganglion(home, "ollama")
    assert (code, "--url" in said) == (2, True)
    code, said = ganglion(home, "ollama", "--url", "http://127.0.0.1:11434/v1", "--own", said="sk-canary\n")
    assert code == 0, said
    assert "sk-canary" not in said
    gateway = Home(home / "gateway")
    assert list_servers(gateway) == (Server("ollama", "http://127.0.0.1:11434/v1", "sk-canary", own=True),)
    assert stat.S_IMODE((gateway.path / "experts" / "servers.json").stat().st_mode) == 0o600
    code, said = ganglion(home, "ollama", "--not-own", said="\n")
    assert code == 0, said
    assert list_servers(gateway)[0] == Server("ollama", "http://127.0.0.1:11434/v1", "sk-canary")
    code, said = ganglion(home, "ollama", said="a b\n")
    assert code == 2, "no header carries it"
    code, said = ganglion(home, "ollama", "--forget")
    assert code == 0, said
    assert list_servers(gateway) == ()
