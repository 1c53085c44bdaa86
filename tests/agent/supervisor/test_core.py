"""The assignment state machine against a transcript, and its invariants over random events."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent import control
from ganglion.agent import supervisor_core as core
from ganglion.wire.errors import ErrorBody, Unavailable

TRANSCRIPT = Path(__file__).with_name("transcripts.txt")


def entries(words: list[str]) -> tuple[control.PeerEntry, ...]:
    return tuple(control.PeerEntry(record=b"", address="", name=word) for word in words)


def parse(line: str) -> core.Event:
    name, *words = line.split()
    if name == "stream-up":
        return core.StreamUp()
    if name == "drain":
        return core.Drain()
    key, rest = core.Key(words[0], int(words[1])), words[2:]
    sizes = [int(size) for size in rest[0].split("/")] if rest and "/" in rest[0] else [0, 0]
    said = {
        "loading": lambda: control.Loading(done_bytes=sizes[0], total_bytes=sizes[1]),
        "listening": lambda: control.Listening(port=int(rest[0])),
        "connected": control.Connected,
        "lost": lambda: control.PeerLost(node_id="someone", reason="silence"),
        "failed": lambda: control.Failed(error=ErrorBody("exhausted", "no memory")),
    }
    if name in said:
        return core.WorkerSaid(key, said[name]())
    made = {
        "assigned": lambda: core.Assigned(key, entries(rest)),
        "connect": lambda: core.ConnectAsked(key, (), entries(rest)),
        "verifier": lambda: core.VerifierTold(key, control.Verifier(target=rest[0])),
        "release": lambda: core.ReleaseAsked(key),
        "fetching": lambda: core.Fetching(key, *sizes),
        "fetched": lambda: core.Fetched(key),
        "gave-up": lambda: core.GaveUp(key, Unavailable("nobody")),
        "exited": lambda: core.WorkerExited(key, int(rest[0]), "last words"),
    }
    return made[name]()


def show(command: core.Command) -> str:
    key = f"{command.key.deployment} {command.key.epoch}"
    match command:
        case core.StartFetch():
            return f"fetch {key}"
        case core.Spawn():
            return f"spawn {key}"
        case core.End():
            return f"end {key}"
        case core.Tell(_, told):
            names = [told.target] if isinstance(told, control.Verifier) else [each.name for each in told.gateways]
            return " ".join(["tell", key, type(told).__name__.lower(), *names])
    if command.error is not None:
        return f"report {key} failed {command.error.code}: {command.error.message}"
    if command.phase in {core.Phase.FAILED, core.Phase.RELEASED}:
        return f"report {key} {command.phase.value}"
    port = f" port {command.port}" if command.port else ""
    return f"report {key} {command.phase.value} {command.done_bytes}/{command.total_bytes}{port}"


def test_the_transcript():
    machine, expected, found = core.Assignments(), [], []
    for line in TRANSCRIPT.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        expected.append(line)
        if line.startswith("> "):
            found.append(line)
            found += [show(command) for command in machine.handle(parse(line[2:]))]
    assert len(found) == len(expected), "\n".join(found)
    for got, wanted in zip(found, expected, strict=True):
        # A transcript may leave the text of an error out, never its code.
        assert got == wanted or got.startswith(wanted + ":"), f"{got!r}, expected {wanted!r}"


keys = st.builds(core.Key, st.sampled_from(["a", "b"]), st.integers(1, 4))
events = st.one_of(
    st.builds(core.Assigned, keys, st.just(())),
    st.builds(core.ConnectAsked, keys, st.just(()), st.just(())),
    st.builds(core.ReleaseAsked, keys),
    st.builds(core.Fetched, keys),
    st.builds(core.GaveUp, keys, st.just(Unavailable("x"))),
    st.builds(core.WorkerExited, keys, st.integers(-15, 3), st.just("")),
    st.builds(
        core.WorkerSaid,
        keys,
        st.sampled_from([control.Listening(port=1), control.Connected(), control.PeerLost(node_id="n", reason="r")]),
    ),
    st.just(core.StreamUp()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=40))
def test_epochs_only_rise_and_whatever_starts_ends_once(sequence):
    machine = core.Assignments()
    started: dict[str, int] = {}
    open_keys: set[core.Key] = set()
    spawned: set[core.Key] = set()
    for event in [*sequence, core.Drain()]:
        for command in machine.handle(event):
            if isinstance(command, core.StartFetch):
                assert command.key.epoch > started.get(command.key.deployment, -1)
                started[command.key.deployment] = command.key.epoch
                open_keys.add(command.key)
            elif isinstance(command, core.Spawn):
                assert command.key in open_keys
                assert command.key not in spawned
                spawned.add(command.key)
            elif isinstance(command, core.Tell):
                assert command.key in spawned & open_keys
            elif isinstance(command, core.End):
                assert command.key in open_keys
                open_keys.remove(command.key)
        assert set(machine.active) == open_keys
        assert len({key.deployment for key in open_keys}) == len(open_keys)
    assert not open_keys


def test_what_a_coordinator_can_make_us_remember_is_bounded():
    machine = core.Assignments()
    for number in range(core.EPOCHS_KNOWN + 50):
        machine.handle(core.ReleaseAsked(core.Key(f"d{number}", 1)))
    assert len(machine._known) == core.EPOCHS_KNOWN
