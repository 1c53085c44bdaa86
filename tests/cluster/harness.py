"""A cluster of real processes on loopback, started from the command line and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
START_S = 60.0
STOP_S = 20.0
POLL_S = 0.05
_pause = threading.Event()


def until(what: str, probe: Callable[[], T | None], *, timeout_s: float = 30.0) -> T:
    """The first true answer of `probe`; fails naming `what` after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        _pause.wait(POLL_S)


@dataclass
class Role:
    """One process group: a role and what it starts."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_file: Path
    about: dict[str, Any] = field(default_factory=dict)

    def kill(self) -> None:
        """SIGKILL to the whole group: what a power cut looks like."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """SIGTERM to the role alone, as a person or systemd would; its exit code."""
        self.process.terminate()
        return self.process.wait(STOP_S)


class Cluster:
    """Coordinator, agents and gateway under one isolated home. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.folder = folder
        self.roles: dict[str, Role] = {}
        self.program = [sys.executable, "-m", "ganglion.cli"]
        scratch = folder / "tmp"
        scratch.mkdir(parents=True)
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("GANGLION_", "XDG_", "COV_"))
        } | {"HOME": str(folder), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a detached `ganglion up`; its children end with it
            up = json.loads((self.home / "owner" / "serving.json").read_bytes())
            os.killpg(int(up["pid"]), signal.SIGKILL)
        for role in reversed(self.roles.values()):
            role.kill()

    # Roles

    def coordinator(self, *options: str) -> Role:
        """`ganglion owner init` and `ganglion serve coordinator`."""
        self.cli("owner", "init")
        ports = ["--bind", "127.0.0.1", "--fleet-port", "0", "--enrolment-port", "0", "--no-mdns"]
        return self._start("coordinator", "serve", "coordinator", *ports, *options)

    def forge_coordinator(self, fleet_port: int, enrolment_port: int) -> Role:
        """The dishonest coordinator of `forging_coordinator.py`, on the registry and ports of the honest one."""
        ports = ["--bind", "127.0.0.1", "--no-mdns", f"--fleet-port={fleet_port}", f"--enrolment-port={enrolment_port}"]
        self.program = [sys.executable, str(Path(__file__).with_name("forging_coordinator.py"))]
        try:
            return self._start("forger", "serve", "coordinator", *ports)
        finally:
            self.program = [sys.executable, "-m", "ganglion.cli"]

    def join(self, *names: str, options: tuple[str, ...] = ()) -> list[Role]:
        """`ganglion token create` and `ganglion join` for each name, all measured side by side."""
        begun = []
        for name in names:
            token = self.cli("token", "create").strip()
            settings = ["--name", name, "--bind", "127.0.0.1", "--threads", "1", *options]
            begun.append(self.begin(name, "join", token, *settings, *self._ready_option(name)))
        return [self.wait_ready(role) for role in begun]

    def gateway(self, *options: str) -> Role:
        """`ganglion serve gateway`, enrolled by a token of its own."""
        token = self.cli("token", "create", "--role", "gateway").strip()
        return self._start("gateway", "serve", "gateway", "--token", token, "--port", "0", *options)

    def _start(self, name: str, *arguments: str) -> Role:
        return self.wait_ready(self.begin(name, *arguments, *self._ready_option(name)))

    def _ready_option(self, name: str) -> tuple[str, str]:
        return "--ready-file", str(self._logs / f"{name}.ready")

    @property
    def _logs(self) -> Path:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        return logs

    def wait_ready(self, role: Role) -> Role:
        """Until its ready file is there; fails with its log when it ends or is late."""

        def ready() -> dict[str, Any] | None:
            if role.process.poll() is not None:
                raise AssertionError(f"{role.name} ended with {role.process.returncode}")
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, Any] = json.loads(role.ready_file.read_bytes())
                return found
            return None

        try:
            role.about = until(f"{role.name} ready", ready, timeout_s=START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{role.log.read_text()}") from None
        return role

    def begin(self, name: str, *arguments: str) -> Role:
        """Start a command in the background without waiting; nothing of ours is inherited."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                self._command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        role = Role(name, process, log, self._logs / f"{name}.ready")
        self.roles[name] = role
        return role

    # The command line

    def run(self, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """One command to its end, whatever its exit code."""
        return subprocess.run(
            self._command(arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            timeout=timeout_s,
            check=False,
        )

    def cli(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, (
            f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The document that a listing prints with --json."""
        return json.loads(self.cli(*arguments, "--json"))

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        home = [] if "--home" in arguments else ["--home", str(self.home)]
        return [*self.program, *arguments, *home]

    # What a test asks

    @property
    def api(self) -> str:
        """Base address of the API."""
        return str(self.roles["gateway"].about["api"])

    def alive(self) -> list[str]:
        """Names of the agents that the coordinator calls alive and measured."""
        return sorted(row["name"] for row in self.json("device", "ls") if row["state"] == "alive" and row["threads"])

    def deployment(self, model: str) -> dict[str, Any]:
        """What `ps` says of a model."""
        return next((row for row in self.json("ps") if row["model"] == model), {"phase": "absent", "shards": []})

    def logs(self, lines: int = 40) -> str:
        """The end of every log, for a failing test."""
        parts = []
        for role in self.roles.values():
            text = role.log.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"---- {role.name} (exit code {role.process.poll()})\n" + "\n".join(text))
        return "\n".join(parts)

    def processes(self) -> list[psutil.Process]:
        """Every living process of every role: supervisors, workers, helpers."""
        found = []
        for role in self.roles.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(role.process.pid)
                found += [parent, *parent.children(recursive=True)]
        return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def ports(self) -> set[int]:
        """Ports that those processes listen on."""
        listening = set()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                listening |= {
                    each.laddr.port
                    for each in process.net_connections(kind="inet")
                    if each.status == psutil.CONN_LISTEN
                }
        return listening
