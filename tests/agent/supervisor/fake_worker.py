"""A worker that computes nothing: speaks agent.control as a real one does, and misbehaves when its folder says so.

`<home>/behavior`: "exit" (after Load, code 3), "garbage" (no event), "deaf" (ignores the end of its input).
"""

import os
import signal
import struct
import sys
from pathlib import Path

from ganglion.agent import control
from ganglion.proto import fleet_pb2


def say(event: control.Event) -> None:
    sys.stdout.buffer.write(control.encode(event))
    sys.stdout.buffer.flush()


def main() -> None:
    load = control.decode_command(sys.stdin.buffer.readline())
    assert isinstance(load, control.Load)
    behavior = (Path(load.home) / "behavior").read_text() if (Path(load.home) / "behavior").exists() else ""
    (Path(load.home) / "drafter.json").write_bytes(load.drafter)
    (Path(load.home) / "worker.pid").write_text(f"{os.getpid()} {load.epoch}")
    print("loading the fake", file=sys.stderr, flush=True)
    if behavior == "exit":
        print("segment 3: the op MatMulNBits failed", file=sys.stderr, flush=True)
        sys.exit(3)
    if behavior == "garbage":
        sys.stdout.write("tensor of shape (1, 2)\n")
        sys.stdout.flush()
    say(control.Loading(done_bytes=1, total_bytes=1))
    Path(load.beat_path).write_bytes(struct.pack("<QQQd", 41, 2, 4096, 0.5))
    say(control.Listening(port=4242))
    for line in sys.stdin.buffer:
        command = control.decode_command(line)
        if isinstance(command, control.Connect):
            names = " ".join(peer.name for peer in command.peers)
            (Path(load.home) / "connected").write_text(names)
        if isinstance(command, control.Gateways | control.Connect):
            (Path(load.home) / "gateways").write_text(" ".join(gateway.name for gateway in command.gateways))
        if isinstance(command, control.Verifier):
            said = f"{command.target} {command.lead.name if command.lead else command.why_away}"
            (Path(load.home) / "verifier").write_text(said)
        if isinstance(command, control.Connect):
            say(control.Connected())
            say(control.Routes(report=fleet_pb2.RouteReport(manifest_digest="ab" * 32, tokens=600).SerializeToString()))
    while behavior == "deaf":
        signal.pause()


if __name__ == "__main__":
    main()
