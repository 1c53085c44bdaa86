"""Two network namespaces joined by a switch in user space; `python bench/link.py --delay-ms 0.2` checks one.

The kernel's netem is not everywhere. Here each namespace has a TAP device, and a process of ours carries frames from
one to the other: each waits for the line to be free, takes its length over the rate, and arrives the delay later. With
jitter the delay of each frame is drawn from delay ± jitter, and frames keep their order; with loss each frame is
dropped with that probability, whatever its length. Both are drawn from a seed. It needs root and /dev/net/tun (Linux),
and a part of a core: where all cores compute, it adds to what it delays.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import random
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

ADDRESSES = ("10.213.0.1", "10.213.0.2")
DEVICE = "link0"
QUEUED_BYTES = 16 << 20  # of each direction; a frame beyond is dropped, as a switch would
FRAME_BYTES = 70 << 10  # a segment of 64 KiB with its headers
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x1, 0x2
CLONE_NEWNET, PR_SET_TIMERSLACK, PR_SET_PDEATHSIG, SIGKILL = 0x40000000, 29, 1, 9
ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", flush=True)
peer, _ = server.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(1 << 16):
    peer.sendall(data)
"""


class Link:
    """Use as a context manager: `command(0)` and `command(1)` begin a command line in either namespace.

    `delay_s`: one way, `jitter_s` either side of it. `bytes_per_s`: of each direction. `loss`: 0 to 1, of frames.
    Raises SystemExit saying what is missing.
    """

    def __init__(
        self, delay_s: float, bytes_per_s: float, *, jitter_s: float = 0.0, loss: float = 0.0, seed: int = 1
    ) -> None:
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s
        self.jitter_s, self.loss, self.seed = jitter_s, loss, seed
        self.names = tuple(f"ganglion-{os.getpid()}-{end}" for end in "ab")
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Link:
        if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
            raise SystemExit("bench/link.py: network namespaces and TAP devices need root and /dev/net/tun; not here")
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            # -u: it says when both devices are there.
            command = [sys.executable, "-u", __file__, "--switch", *self.names]
            figures = ["--delay-ms", str(self.delay_s * 1e3), "--mbit", str(self.bytes_per_s * 8e-6)]
            figures += ["--jitter-ms", str(self.jitter_s * 1e3), "--loss", str(self.loss), "--seed", str(self.seed)]
            self._switch = subprocess.Popen([*command, *figures], stdout=subprocess.PIPE, text=True)
            if self._switch.stdout is None or self._switch.stdout.readline() != "ready\n":
                raise SystemExit("bench/link.py: the switch did not begin")
            for end, address in enumerate(ADDRESSES):
                _run(*self.command(end), "ip", "address", "add", f"{address}/24", "dev", DEVICE)
                _run(*self.command(end), "ip", "link", "set", DEVICE, "up")
                _run(*self.command(end), "ip", "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            if self._switch.stdout is not None:
                self._switch.stdout.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)

    def command(self, end: int) -> list[str]:
        """What a command begins with to run at an end."""
        return ["ip", "netns", "exec", self.names[end]]

    def enter(self, end: int) -> None:
        """Move this thread, and what it starts from now on, to an end."""
        _enter(self.names[end])

    def retransmitted(self) -> tuple[int, int]:
        """TCP segments that both ends have sent, and how many of them again."""
        sent = again = 0
        for end in range(2):
            lines = [line.split() for line in _run(*self.command(end), "cat", "/proc/net/snmp").splitlines()]
            names, figures = (line for line in lines if line[0] == "Tcp:")
            found = dict(zip(names[1:], figures[1:], strict=True))
            sent, again = sent + int(found["OutSegs"]), again + int(found["RetransSegs"])
        return sent, again

    def measure(self, port: int = 5999) -> dict[str, float]:
        """Round trips from end 0 in ms, of 50 each, and Mbit/s of 8 MiB there and back.

        rtt_64_ms, rtt_8192_ms: medians, of so many bytes; rtt_low_ms, rtt_high_ms: the 5th and 95th hundredth of 64 B.
        """
        command = [*self.command(1), sys.executable, "-c", ECHO, ADDRESSES[1], str(port)]
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import link; print(link.trips(sys.argv[2], int(sys.argv[3])))"
        )
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                here = [sys.executable, "-c", code, str(Path(__file__).parent), ADDRESSES[1], str(port)]
                said = _run(*self.command(0), *here)
            finally:
                server.kill()
        names = ("rtt_low_ms", "rtt_64_ms", "rtt_high_ms", "rtt_8192_ms", "mbit_each_way")
        return dict(zip(names, map(float, said.strip().strip("()").split(",")), strict=True))


def trips(host: str, port: int) -> tuple[float, float, float, float, float]:
    """What `Link.measure` says."""
    with socket.create_connection((host, port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        small, large = (_trips_ms(peer, size) for size in (64, 8192))
        size, sent, got, started = 8 << 20, 0, 0, time.perf_counter()
        peer.setblocking(False)
        block = bytes(1 << 16)
        while got < size:
            readable, writable, _ = select.select([peer], [peer] if sent < size else [], [])
            if readable:
                got += len(peer.recv(1 << 16))
            if writable:
                sent += peer.send(block[: size - sent])
        mbit = size * 8e-6 / (time.perf_counter() - started)
    return small[2], statistics.median(small), small[-3], statistics.median(large), mbit


def _trips_ms(peer: socket.socket, size: int) -> list[float]:
    taken = []
    for _ in range(55):
        started, got = time.perf_counter(), 0
        peer.sendall(bytes(size))
        while got < size:
            got += len(peer.recv(1 << 16))
        taken.append((time.perf_counter() - started) * 1e3)
    return sorted(taken[5:])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench/link.py: {' '.join(command[:6])}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _enter(name: str) -> None:
    with Path(f"/run/netns/{name}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {name}")


def _tap(name: str) -> int:
    """A TAP device in the namespace `name`; frames come with the header that lets large segments pass."""
    _enter(name)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return device


class _Line:
    """One direction: when a frame that comes now arrives, if it does. Pure but for the device that it writes to."""

    def __init__(self, into: int, chosen: argparse.Namespace, seed: int) -> None:
        self._into, self._bytes_per_s = into, chosen.mbit * 125e3
        self._delay_s, self._jitter_s, self._loss = chosen.delay_ms / 1e3, chosen.jitter_ms / 1e3, chosen.loss
        self._random = random.Random(seed)
        self._free_s = self._last_s = 0.0
        self._held = 0
        self._frames: deque[tuple[float, bytes]] = deque()

    def take(self, frame: bytes, now_s: float) -> None:
        if self._held + len(frame) > QUEUED_BYTES:
            return
        self._free_s = max(self._free_s, now_s) + len(frame) / self._bytes_per_s
        if self._loss and self._random.random() < self._loss:
            return
        due_s = self._free_s + self._delay_s
        if self._jitter_s:
            due_s += self._random.uniform(-self._jitter_s, self._jitter_s)
        self._last_s = max(self._last_s, due_s)  # none overtakes another
        self._held += len(frame)
        self._frames.append((self._last_s, frame))

    @property
    def due_s(self) -> float:
        return self._frames[0][0] if self._frames else float("inf")

    def give(self, now_s: float) -> None:
        while self._frames and self._frames[0][0] <= now_s:
            _, frame = self._frames.popleft()
            self._held -= len(frame)
            try:
                os.write(self._into, frame)
            except OSError:  # the device is down, or its queue is full: a lost frame
                continue


def switch(names: list[str], chosen: argparse.Namespace) -> None:
    """Carry frames until killed."""
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    library.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    devices = [_tap(name) for name in names]
    lines = {devices[end]: _Line(devices[1 - end], chosen, 2 * chosen.seed + end) for end in range(2)}
    print("ready")
    while True:
        wait_s = min(line.due_s for line in lines.values()) - time.monotonic()
        readable, _, _ = select.select(devices, [], [], None if wait_s == float("inf") else max(0.0, wait_s))
        for device in readable:
            while True:
                try:
                    frame = os.read(device, FRAME_BYTES)
                except OSError:  # nothing more, or the device is down
                    break
                lines[device].take(frame, time.monotonic())
        for line in lines.values():
            line.give(time.monotonic())


def main() -> None:
    """Check a link: what was asked for, and what two processes see over it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=0.2, help="one way")
    parser.add_argument("--mbit", type=float, default=1000.0, help="Mbit/s of each direction")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="either side of the delay, at most the delay")
    parser.add_argument("--loss", type=float, default=0.0, help="0 to 1: the part of the frames that is dropped")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--switch", nargs=2, metavar="NAMESPACE", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not 0 <= chosen.jitter_ms <= chosen.delay_ms or not 0 <= chosen.loss < 1:
        parser.error("--jitter-ms is at most --delay-ms, --loss is below 1")
    if chosen.switch:
        switch(chosen.switch, chosen)
        return
    how = {"jitter_s": chosen.jitter_ms / 1e3, "loss": chosen.loss, "seed": chosen.seed}
    with Link(chosen.delay_ms / 1e3, chosen.mbit * 125e3, **how) as link:
        found = link.measure()
        sent, again = link.retransmitted()
    asked = f"{2 * chosen.delay_ms:g} ms there and back at {chosen.mbit:g} Mbit/s"
    print(f"asked: {asked}, ± {chosen.jitter_ms:g} ms each way, {chosen.loss:.1%} lost")
    spread = f"{found['rtt_low_ms']:.2f} to {found['rtt_high_ms']:.2f}"
    trips_ms = f"{found['rtt_64_ms']:.2f} ms ({spread}) of 64 B, {found['rtt_8192_ms']:.2f} ms of 8 KiB"
    print(f"found: {trips_ms}, {found['mbit_each_way']:.0f} Mbit/s each way; TCP sent {sent} segments, {again} again")


if __name__ == "__main__":
    main()
