"""Puts a device's shard together in its run folder and opens a session of ONNX Runtime per segment."""

from __future__ import annotations

import ctypes
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ganglion.agent.executor.graph_file import check_file, check_graph
from ganglion.agent.executor.prepacked import Prepacked, Sources
from ganglion.wire.errors import Corrupt, GanglionError, Internal, InvalidDocument
from ganglion.wire.nouns import WEIGHTS_FILE, Manifest, NumericClass, PieceRef, Range, Segment, Share, Stage
from ganglion.wire.shares import OpenPiece, weights_size, write_weights

_pool_lock = threading.Lock()
_pool_threads: int | None = None


def start_runtime(threads: int) -> None:
    """Give the process its one pool of `threads` intra-op threads; raises Internal when it has one of another size.

    Pools of their own cost every session 13 ms a run; sessions that share an arena keep one set of scratch buffers.
    """
    global _pool_threads  # noqa: PLW0603 - ONNX Runtime's environment is one per process too
    with _pool_lock:
        if _pool_threads is None:
            ort.set_default_logger_severity(3)
            ort.set_global_thread_pool_sizes(threads, 1)
            ort.create_and_register_allocator(
                ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT), None
            )
            _pool_threads = threads
        elif _pool_threads != threads:
            raise Internal(f"this process computes with {_pool_threads} threads; {threads} need another process")


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Graphs are built fused; an optimizer that fused differently for another share would change the numbers.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _session(graph: Path, save: Path | None) -> Any:
    """A session of `graph`, whose weights lie beside it; `save`: where to write it with its weights prepacked."""
    options = _options()
    if save is not None:
        options.optimized_model_filepath = str(save)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS_FILE)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True)
class LoadedSegment:
    """A segment of this device, how many groups of it, and its graphs' sessions in the order in which they run.

    There are three where it attends on this device, and none where there is nothing to run. projected, attended:
    numbers a row that the first leaves for the second, and the second for the third.
    """

    segment: Segment
    groups: int
    sessions: tuple[Any, ...]
    projected: int = 0
    attended: int = 0

    @property
    def attends(self) -> bool:
        """Whether it has key-value state on this device."""
        return self.segment.attends and self.groups > 0


@dataclass(frozen=True, slots=True)
class Shard:
    """What a device runs: segments in order, and the head where it has a vocabulary range.

    prompt: the segments of prompt tokens where the class mixes formats, else the same.
    """

    segments: tuple[LoadedSegment, ...]
    prompt: tuple[LoadedSegment, ...]
    head: LoadedSegment | None
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of this device's share, named by its place: its groups, and bytes of weights."""

    name: str
    segment: Segment
    share: Range
    size: int

    @property
    def runs(self) -> bool:
        """Whether there is a graph to run."""
        return _runs(self.name, self.segment, self.share)


def parts_of(manifest: Manifest, stage: Stage, share: Share) -> Iterator[Part]:
    """Segments of the stage, then those of prompt tokens where formats mix, then the head; raises InvalidDocument."""
    if stage.layers.stop > len(manifest.layers):
        raise InvalidDocument(f"plan: layers ..{stage.layers.stop}, the manifest has {len(manifest.layers)}")
    for prefix, layers in (("", manifest.layers), ("prompt-", manifest.prompt_layers)):
        for number, layer in enumerate(layers[stage.layers.start : stage.layers.stop], stage.layers.start):
            for index, segment in enumerate(layer.segments):
                groups = share.heads if segment.axis == "heads" else share.columns
                yield _part(f"{prefix}{number}-{index}", segment, groups)
    yield _part("head", manifest.head, share.vocab)


def _part(name: str, segment: Segment, groups: Range) -> Part:
    if groups.stop > segment.groups:
        raise InvalidDocument(f"plan: groups ..{groups.stop} of segment {name}, the manifest has {segment.groups}")
    return Part(name, segment, groups, weights_size(segment, groups) if _runs(name, segment, groups) else 0)


def _runs(name: str, segment: Segment, groups: Range) -> bool:
    """Whether there is a graph to run: without a group only where the residual must be kept as the others have it."""
    return groups.count > 0 or (segment.takes != "carry" and name != "head")


def load_shard(
    manifest: Manifest,
    stage: Stage,
    share: Share,
    *,
    open_piece: OpenPiece,
    folder: Path,
    progress: Callable[[int, int], None],
    prepacked: Prepacked | None = None,
) -> Shard:
    """Open every session, `progress(done_bytes, total_bytes)` as it goes, in as many threads as compute.

    From prepacked parts where those are given; else graphs and weights are put together below `folder`, where nothing
    is left: what is loaded stays mapped. Raises Corrupt (a graph or piece that is not what the manifest says), NotFound
    (a piece is missing), InvalidDocument (a plan that does not go with the manifest).
    """
    parts = list(parts_of(manifest, stage, share))
    total, done = sum(part.size for part in parts), 0
    loaded = []
    loader = _Loader(manifest, open_piece, folder, prepacked)
    with ThreadPoolExecutor(_pool_threads or 1, thread_name_prefix="load") as pool:
        try:
            for part, sessions in zip(parts, pool.map(loader.load, parts), strict=True):
                done += part.size
                progress(done, total)
                widths = _widths(part, sessions) if len(sessions) > 1 else (0, 0)
                loaded.append(LoadedSegment(part.segment, part.share.count, sessions, *widths))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _return_memory()
    head = loaded.pop()
    own = len(loaded) // 2 if manifest.prompt_layers else len(loaded)
    segments, prompt = tuple(loaded[:own]), tuple(loaded[own:])
    return Shard(segments, prompt or segments, head if head.sessions else None, total)


def _return_memory() -> None:
    """Give back what packing left free: glibc would keep up to half of the weights' size."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class _Loader:
    """Opens the graphs of parts, in several threads; those without weights once for all parts that have them."""

    def __init__(self, manifest: Manifest, open_piece: OpenPiece, folder: Path, prepacked: Prepacked | None) -> None:
        self._manifest = manifest
        self._open_piece = open_piece
        self._folder = folder
        self._prepacked = prepacked
        self._sharing = threading.Lock()
        self._shared: dict[tuple[str, int], Any] = {}

    def load(self, part: Part) -> tuple[Any, ...]:
        """The sessions of a part's graphs."""
        if not part.runs:
            return ()
        name = f"{part.segment.kind}/{part.share.count}"
        pieces, ends = self._manifest.graphs.get(name), _ends(part)
        if pieces is None or len(pieces) != len(ends):
            raise InvalidDocument(
                f"manifest {self._manifest.name}: {len(pieces or ())} graphs {name!r}, the plan needs {len(ends)}"
            )
        folder = self._folder / part.name
        folder.mkdir(mode=0o700, parents=True)
        sessions = []
        try:
            for number, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
                session = self._open(name, number, piece, part)
                _check_ends(name, session, end, self._manifest.numeric_class)
                sessions.append(session)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return tuple(sessions)

    def _open(self, name: str, number: int, piece: PieceRef, part: Part) -> Any:
        graph = self._open_piece(piece.digest)
        weighs = check_graph(graph, part.size)

        def write() -> Path:
            path = self._folder / part.name / f"{number}.onnx"
            path.write_bytes(graph)
            check_file(path, len(graph))
            if weighs:
                self._write_weights(part)
            return path

        try:
            if not weighs:
                with self._sharing:
                    session = self._shared.get((piece.digest, number))
                    if session is None:
                        session = self._shared[piece.digest, number] = _session(write(), None)
                    return session
            if self._prepacked is None:
                return _session(write(), None)
            return self._prepacked.open(Sources(piece, part.segment, part.share, part.size), write, _session)
        except (GanglionError, OSError):
            raise
        except Exception as error:
            raise Corrupt(f"graph {name} of {self._manifest.name} does not load: {error}") from error

    def _write_weights(self, part: Part) -> None:
        """Write the weights of a part's graphs, once for all of them."""
        path = self._folder / part.name / WEIGHTS_FILE
        if not path.exists():
            with path.open("xb") as file:
                write_weights(part.segment, part.share, self._open_piece, file)
            check_file(path, part.size)


_Ends = tuple[set[str], set[str]]


def _ends(part: Part) -> tuple[_Ends, ...]:
    """The inputs and outputs of a segment's graphs, as `Manifest` has them."""
    segment = part.segment
    if part.name == "head":
        return (({"res", "delta"}, {"logits"}),)
    inputs, outputs = {"res", "delta"}, {"res_out"}
    if segment.takes == "carry":
        inputs, outputs = {"carry", "delta"}, set()
    if part.share.count and segment.carry:
        outputs.add("carry")
    if not (part.share.count and segment.attends):
        return ((inputs, outputs | {"partial"}),)
    state = {"past_key", "past_value", "seqlens_k", "total"} | ({"cos", "sin"} if segment.rope else set())
    return (
        (inputs, outputs | {"projected"}),
        ({"projected", *state}, {"attended", "present_key", "present_value"}),
        ({"attended"}, {"partial"}),
    )


def _check_ends(name: str, session: Any, ends: _Ends, numeric_class: NumericClass) -> None:
    types = {one.name: one.type for one in (*session.get_inputs(), *session.get_outputs())}
    found = ({one.name for one in session.get_inputs()}, {one.name for one in session.get_outputs()})
    if found != ends:
        raise Corrupt(f"graph {name}: inputs {sorted(found[0])}, outputs {sorted(found[1])} are not the contract's")
    wide = "tensor(double)" if numeric_class.exact else "tensor(float)"
    for end in ("delta", "partial"):
        if types.get(end, wide) != wide:
            raise Corrupt(f"graph {name}: {end} is {types[end]}, {numeric_class.name} takes {wide}")


def _widths(part: Part, sessions: Sequence[Any]) -> tuple[int, int]:
    """Numbers a row between the graphs of a segment that attends; raises Corrupt where two do not meet."""
    found = []
    for before, after, end in zip(sessions, sessions[1:], ("projected", "attended"), strict=False):
        left = next(one.shape[-1] for one in before.get_outputs() if one.name == end)
        taken = next(one.shape[-1] for one in after.get_inputs() if one.name == end)
        if left != taken or not isinstance(left, int):
            raise Corrupt(f"graph {part.segment.kind}/{part.share.count}: {end} is left {left} wide and taken {taken}")
        found.append(left)
    return found[0], found[1]
