"""Puts a device's shard together in its run folder and opens a session of ONNX Runtime per segment."""

from __future__ import annotations

import ctypes
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from ganglion.agent.executor.graph_file import check_file, check_graph
from ganglion.agent.executor.parts import Ends, Part, ends_of, parts_of
from ganglion.agent.executor.prepacked import Prepacked, Sources
from ganglion.agent.paging.loading import PagedLoading
from ganglion.agent.paging.pager import Pager
from ganglion.agent.paging.parts import PagedExperts
from ganglion.agent.paging.routers import router_of
from ganglion.wire.errors import Corrupt, GanglionError, Internal, InvalidDocument, Unsupported
from ganglion.wire.nouns import WEIGHTS_FILE, Manifest, NumericClass, PieceRef, Segment, Share, Stage
from ganglion.wire.shares import OpenPiece, graph_name, write_weights

INT64: Final = "tensor(int64)"

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

    There are three where it attends on this device, and none where there is nothing to run; of whole experts one that
    routes, unless the device holds experts only, and one of those that are held (`held`, by rising number). layer: of
    the model. projected, attended: numbers a row that the first leaves for the second, and the second for the third.
    paged: its place among the shard's layers whose experts are not all in memory, -1 where it is none of these.
    """

    segment: Segment
    groups: int
    sessions: tuple[Any, ...]
    projected: int = 0
    attended: int = 0
    layer: int = 0
    held: tuple[int, ...] = ()
    routes: bool = False
    paged: int = -1

    @property
    def attends(self) -> bool:
        """Whether it has key-value state on this device."""
        return self.segment.attends and self.groups > 0

    @property
    def experts(self) -> Any | None:
        """The session of the experts that it holds."""
        return self.sessions[-1] if self.held else None

    @property
    def holds_all(self) -> bool:
        """Whether no expert lies elsewhere alone."""
        return self.groups == self.segment.groups


@dataclass(frozen=True, slots=True)
class Shard:
    """What a device runs: segments in order, and the head where it has a vocabulary range.

    prompt: the segments of prompt tokens where the class mixes formats, else the same. pager: brings experts into
    memory that does not hold them all; who loaded the shard closes it.
    """

    segments: tuple[LoadedSegment, ...]
    prompt: tuple[LoadedSegment, ...]
    head: LoadedSegment | None
    weights_bytes: int
    pager: Pager | None = None


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
    is left: what is loaded stays mapped. Experts of a share with `expert_cache_bytes` stay on disk (`Shard.pager`).
    Raises Corrupt (a graph or piece that is not what the manifest says), NotFound (a piece is missing), InvalidDocument
    (a plan that does not go with the manifest), Unsupported and Exhausted where experts cannot be kept on disk.
    """
    parts = list(parts_of(manifest, stage, share))
    total, done = sum(part.size for part in parts), 0
    loaded: list[LoadedSegment] = []
    layers: list[PagedExperts] = []
    paging = PagedLoading(folder, prepacked) if share.expert_cache_bytes else None
    loader = _Loader(manifest, open_piece, folder, prepacked, paging)
    with ThreadPoolExecutor(_pool_threads or 1, thread_name_prefix="load") as pool:
        try:
            for part, sessions in zip(parts, pool.map(loader.load, parts), strict=True):
                done += part.size
                progress(done, total)
                widths = _widths(part, sessions) if part.segment.attends and len(sessions) > 1 else (0, 0)
                paged = paging.paged(part.name) if paging is not None else None
                place = len(layers) if paged is not None else -1
                layers += [paged] if paged is not None else []
                loaded.append(
                    LoadedSegment(
                        part.segment, part.count, sessions, *widths, part.layer, part.held, part.routes, place
                    )
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            if paging is not None:
                paging.close(failed=True)
            raise
    if paging is not None:
        paging.close(failed=False)
    _return_memory()
    pager = _pager(loaded, layers, share, open_piece) if layers else None
    head = loaded.pop()
    of_layers = len(loaded) // 2 if manifest.prompt_layers else len(loaded)
    segments, prompt = tuple(loaded[:of_layers]), tuple(loaded[of_layers:])
    return Shard(segments, prompt or segments, head if head.sessions else None, total, pager)


def _pager(
    loaded: Sequence[LoadedSegment], layers: Sequence[PagedExperts], share: Share, open_piece: OpenPiece
) -> Pager:
    mixtures = [one for one in loaded if one.paged >= 0]
    routers = [router_of(one.segment, one.held, open_piece) if one.routes else None for one in mixtures]
    try:
        return Pager(layers, share.expert_cache_bytes, routers=routers)
    except BaseException:
        for layer in layers:
            layer.close()
        raise


def _return_memory() -> None:
    """Give back what packing left free: glibc would keep up to half of the weights' size."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class _Loader:
    """Opens the graphs of parts, in several threads; those without weights once for all parts that have them."""

    def __init__(
        self,
        manifest: Manifest,
        open_piece: OpenPiece,
        folder: Path,
        prepacked: Prepacked | None,
        paging: PagedLoading | None,
    ) -> None:
        self._paging = paging
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
        name = graph_name(part.segment, part.share)
        pieces, ends = self._manifest.graphs.get(name), ends_of(part)
        if pieces is None or len(pieces) != len(ends):
            raise InvalidDocument(
                f"manifest {self._manifest.name}: {len(pieces or ())} graphs {name!r}, the plan needs {len(ends)}"
            )
        folder = self._folder / part.name
        folder.mkdir(mode=0o700, parents=True)
        sessions = []
        try:
            for number, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
                if part.held_only and not number:
                    continue  # rows come with their experts chosen
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
            sources = Sources(piece, part.segment, part.share, part.size)
            if self._paging is not None and part.held and number:
                if any(slot.groups is not None for slot in part.segment.slots):
                    raise Unsupported("experts of two formats do not stay on disk yet: leave out --expert-memory")
                return self._paging.open(part.name, sources, graph, part.count, write, start=_session).session
            if self._prepacked is None:
                return _session(write(), None)
            return self._prepacked.open(sources, write, _session)
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


def _check_ends(name: str, session: Any, ends: Ends, numeric_class: NumericClass) -> None:
    types = {one.name: one.type for one in (*session.get_inputs(), *session.get_outputs())}
    found = ({one.name for one in session.get_inputs()}, {one.name for one in session.get_outputs()})
    if found != ends:
        raise Corrupt(f"graph {name}: inputs {sorted(found[0])}, outputs {sorted(found[1])} are not the contract's")
    wide = "tensor(double)" if numeric_class.exact else "tensor(float)"
    for end, kind in (("delta", wide), ("partial", wide), ("chosen", INT64), ("index", INT64)):
        if types.get(end, kind) != kind:
            raise Corrupt(f"graph {name}: {end} is {types[end]}, {numeric_class.name} takes {kind}")


def _widths(part: Part, sessions: Sequence[Any]) -> tuple[int, int]:
    """Numbers a row between the graphs of a segment that attends; raises Corrupt where two do not meet."""
    found = []
    for before, after, end in zip(sessions, sessions[1:], ("projected", "attended"), strict=False):
        left = next(one.shape[-1] for one in before.get_outputs() if one.name == end)
        taken = next(one.shape[-1] for one in after.get_inputs() if one.name == end)
        if left != taken or not isinstance(left, int):
            raise Corrupt(f"graph {part.segment.kind}/{part.count}: {end} is left {left} wide and taken {taken}")
        found.append(left)
    return found[0], found[1]
