"""The executor against the dumb runner (bit for bit) and against transformers, alone, in shares and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_llama, make_qwen3
from reference_runner import Runner, cut_evenly
from transformers import AutoModelForCausalLM

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.store import PieceStore, needed_pieces
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.wire.errors import Corrupt, Exhausted, InvalidDocument, ProtocolViolation
from ganglion.wire.limits import TREE_BRANCHES
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest

SHAPES: dict[str, Any] = {
    "llama": (make_llama, {"num_key_value_heads": 4, "max_position_embeddings": 1100}),
    "qwen3": (make_qwen3, {"dtype": "bfloat16", "max_position_embeddings": 96}),
}
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 283, 60)]


class Cut:
    def __init__(self, folder: Path, shape: str, weights: str, fast: bool) -> None:
        make, options = SHAPES[shape]
        self.folder = folder
        self.path = make(folder / "checkpoint", **options)
        self.store = PieceStore(folder / "store")
        kind = numeric_class(self.path, weights, fast=fast)
        self.manifest: Manifest = partition(self.path, self.store, name=shape, numeric_class=kind)
        self.embedding = EmbeddingTable(self.manifest, self.store.open)
        self.opened = 0

    def reference(self, weights: Sequence[float] = (1,)) -> Runner:
        self.opened += 1
        return Runner(
            self.manifest,
            SimpleNamespace(file=self.store.path_of),
            self.folder / f"r{self.opened}",
            cut_evenly(self.manifest, weights),
        )

    def plan(
        self,
        weights: Sequence[float],
        *,
        sessions: int = 64,
        context: int = 0,
        chunk: int = 64,
        prefix_tokens: int = 0,
    ) -> Plan:
        shares = tuple(
            Share(device=letter * 26, heads=cut.heads, columns=cut.columns, vocab=cut.vocab)
            for letter, cut in zip("abcd", cut_evenly(self.manifest, weights), strict=False)
        )
        stage = Stage(layers=Range(0, self.manifest.geometry.layers), shares=shares, topology="mesh")
        return Plan(
            manifest_digest=digest(self.manifest),
            numeric_class=self.manifest.numeric_class,
            context=context or self.manifest.geometry.context,
            sessions=sessions,
            kv_tokens=4 * 8192,
            chunk=chunk,
            stages=(stage,),
            threads={},
            prefix_tokens=prefix_tokens,
        )

    def executors(self, weights: Sequence[float] = (1,), *, prepacked: Prepacked | None = None, **options: int):
        start_runtime(1)
        plan = self.plan(weights, **options)
        (stage,) = plan.stages
        self.opened += 1
        found = []
        for rank, share in enumerate(stage.shares):
            shard = load_shard(
                self.manifest,
                stage,
                share,
                open_piece=self.store.open,
                folder=self.folder / f"x{self.opened}-{rank}",
                progress=lambda done, total: None,
                prepacked=prepacked,
            )
            found.append(Executor(self.manifest, plan, shard, self.store.open))
        return Together(self, found)


class Together:
    """Executors of all shares, with sums made by hand."""

    def __init__(self, cut: Cut, executors: list[Executor]) -> None:
        self.cut = cut
        self.executors = executors

    def step(
        self, entries: Sequence[tuple[int, int, int]], ids: Sequence[int], takes: dict[int, Take] | None = None
    ) -> np.ndarray:
        """Logits of every row [rows, vocab], in runs of as many rows as a step may draw from."""
        batches = [one.begin(entries, takes=takes) for one in self.executors]
        for one, batch in zip(self.executors, batches, strict=True):
            self.cut.embedding.rows(ids, one.residual(batch))
        for index in range(self.executors[0].segments):
            partials = [one.run(batch, index) for one, batch in zip(self.executors, batches, strict=True)]
            total = sum(partial.copy() for partial in partials)
            for partial in partials:
                partial[...] = total
            parts = [
                np.concatenate(
                    [one.logits(batch, range(at, min(at + 2, batch.rows))) for at in range(0, batch.rows, 2)]
                )
                for one, batch in zip(self.executors, batches, strict=True)
                if one._shard.head is not None
            ]
        return np.concatenate(parts, axis=1)[:, : self.cut.manifest.geometry.vocab]

    def sequence(self, ids: Sequence[int], chunks: Sequence[int], session: int = 1) -> np.ndarray:
        found, start = [], 0
        for count in chunks:
            found.append(self.step([(session, start, count)], ids[start : start + count]))
            start += count
        return np.concatenate(found)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory):
    made: dict[Any, Cut] = {}

    def get(shape: str, weights: str = "fp32", fast: bool = False) -> Cut:
        key = (shape, weights, fast)
        if key not in made:
            made[key] = Cut(tmp_path_factory.mktemp("-".join(map(str, key))), *key)
        return made[key]

    return get


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_transformers(cuts, shape):
    cut = cuts(shape)
    reference = AutoModelForCausalLM.from_pretrained(cut.path, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    for weights in ([1], [3, 1], [1, 2, 1]):
        found = cut.executors(weights).sequence(IDS, [13, 1, 1, 45])
        assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_classes_are_bit_equal_for_any_split_and_chunking(cuts, shape, weights):
    cut = cuts(shape, weights)
    expected, _ = cut.reference().forward(IDS)
    for shares in ([1], [1, 1], [3, 1], [2, 1, 1], [1, 0, 1]):
        together = cut.executors(shares)
        for session, chunks in enumerate(([60], [1] * 60, [7, 1, 2, 50], [33, 27])):
            assert np.array_equal(together.sequence(IDS, chunks, session), expected), (shares, chunks)


def test_fast_classes_agree_closely(cuts):
    cut = cuts("llama", "int4", True)
    expected, _ = cut.reference().forward(IDS)
    found = cut.executors([2, 1]).sequence(IDS, [20, 1, 39])
    assert np.abs(found - expected).max() / np.abs(expected).max() < 0.2
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.8


@pytest.mark.parametrize(("weights", "fast"), [("fp32", False), ("int4", False), ("int4", True), ("int8", False)])
def test_prepacked_parts_give_the_same_bits(cuts, weights, fast):
    cut = cuts("llama", weights, fast)
    expected = cut.executors([3, 1]).sequence(IDS, [13, 1, 1, 45])
    for kept in (False, True):
        prepacked = Prepacked(cut.store, least_bytes=0)
        assert bool(cut.store.prepacked.used_bytes()) is kept
        found = cut.executors([3, 1], prepacked=prepacked).sequence(IDS, [13, 1, 1, 45])
        assert np.array_equal(found, expected), kept
        prepacked.keep()
        prepacked.close()
    cut.store.prepacked.shrink(1 << 40)
    assert not cut.store.prepacked.used_bytes()


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_sessions_in_one_step_do_not_see_each_other(cuts, weights):
    cut = cuts("llama", weights)
    lines = {9: IDS[:20], 4: IDS[20:29], 6: IDS[29:60]}
    alone = cut.executors([1])
    expected = {one: alone.sequence(ids, [len(ids)], one) for one, ids in lines.items()}
    together = cut.executors([2, 1])
    held, found = dict.fromkeys(lines, 0), {one: [] for one in lines}
    for counts in ({9: 1}, {9: 3, 4: 1}, {4: 4, 6: 10, 9: 1}, {6: 1, 4: 1, 9: 1}, {6: 20, 4: 3, 9: 14}):
        entries = [(one, held[one], count) for one, count in counts.items()]
        ids = [token for one, start, count in entries for token in lines[one][start : start + count]]
        rows = together.step(entries, ids)
        for one, _, count in entries:
            found[one].append(rows[:count])
            rows = rows[count:]
            held[one] += count
    for one, ids in lines.items():
        assert held[one] == len(ids)
        assert np.array_equal(np.concatenate(found[one]), expected[one])


def test_capacity_grows_without_a_trace(cuts):
    cut = cuts("llama")
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 283, 700)]
    whole = cut.executors([1], chunk=700, sessions=700).sequence(ids, [700])
    stepped = cut.executors([1], chunk=511, sessions=511)
    found = stepped.sequence(ids, [510, *[1] * 5, 185])
    assert np.array_equal(found, whole)
    per_token = 2 * 4 * 4 * 16 * 2  # keys and values, float32, groups, head_dim, layers
    assert stepped.executors[0].kv_bytes == 1024 * per_token
    stepped.executors[0].close(1)
    assert stepped.executors[0].kv_bytes == 0
    assert stepped.executors[0].sessions == 0


def test_the_last_position_that_is_ever_run_alone(cuts):
    """A context of n tokens has its last row run at n - 2: the token at n - 1 is drawn, never run."""
    cut = cuts("qwen3")
    context = cut.manifest.geometry.context
    ids = (IDS * 2)[: context - 1]
    expected, _ = cut.reference().forward(ids)
    together = cut.executors([1], chunk=context)
    assert np.array_equal(together.sequence(ids, [context - 2, 1]), expected)
    with pytest.raises(ProtocolViolation, match="context"):
        together.step([(1, context - 1, 1)], [1])


def test_steps_that_no_scheduler_makes_are_refused(cuts):
    together = cuts("llama").executors([1], sessions=2, chunk=8, context=64)
    together.step([(1, 0, 4)], IDS[:4])
    for entries in ([], [(1, 0, 9)], [(1, 4, 1), (1, 5, 1)], [(2, 3, 1)], [(1, 5, 1)], [(1, 4, 0)], [(1, 60, 5)]):
        with pytest.raises(ProtocolViolation):
            together.executors[0].begin(entries)
    together.step([(2, 0, 1)], IDS[:1])
    with pytest.raises(Exhausted, match="2 sessions"):
        together.executors[0].begin([(3, 0, 1)])


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_f3_logits_after_kept_blocks_are_those_of_a_whole_run(cuts, shape, weights):
    """The blocks of two sessions make a third's beginning; an odd number of rows pads, and the pad is never kept."""
    cut, ids = cuts(shape, weights), (IDS * 2)[:89]
    expected, _ = cut.reference().forward(ids)
    for shares in ([1], [3, 1], [1, 0, 1]):
        together = cut.executors(shares, chunk=96, prefix_tokens=96)
        together.sequence(ids[:33], [33], 1)
        for one in together.executors:
            one.prepare([Keep(1, 0, (2,))], [1], [Begin(2, (2,), 67)])
        assert np.array_equal(together.step([(2, 32, 35)], ids[32:67]), expected[32:67])
        for one in together.executors:
            one.prepare([Keep(2, 1, (0,))], [2], [Begin(3, (2, 0), 89)])
            assert (one.sessions, one.kv_bytes > 0) == (1, one._shard.segments[0].groups > 0)
        assert np.array_equal(together.step([(3, 64, 25)], ids[64:]), expected[64:])


def test_blocks_that_no_lead_names_are_refused(cuts):
    one = cuts("llama").executors([1], sessions=2, context=128, prefix_tokens=96)
    one.sequence(IDS, [60], 1)
    executor = one.executors[0]
    executor.prepare([Keep(1, 0, (1,))], [], [])
    kept = executor._prefixes._blocks[1].copy()
    for keeps, begins, words in (
        ([Keep(1, 0, (3,))], [], "block 3; the plan has 3"),
        ([Keep(1, 1, (0,))], [], "60 tokens"),
        ([Keep(1, 2**40, (0,))], [], "60 tokens"),
        ([Keep(1, 0, ())], [], "blocks 0..0"),
        ([Keep(9, 0, (0,))], [], "session 9"),
        ([], [Begin(2, (0,), 50)], "block 0 holds nothing"),
        ([], [Begin(2, (4,), 50)], "block 4 holds nothing"),
        ([], [Begin(2, (1,) * 3, 128)], "96 tokens of a prompt of 128"),
        ([], [Begin(2, (1,) * 2, 64)], "64 tokens of a prompt of 64"),
        ([], [Begin(2, (), 50)], "0 tokens"),
        ([], [Begin(1, (1,), 50)], "session 1"),
    ):
        with pytest.raises(ProtocolViolation, match=words):
            executor.prepare(keeps, [], begins)
        executor.close(2)
    executor.prepare([], [], [Begin(2, (1, 1, 1), 97)])
    with pytest.raises(Exhausted, match="2 sessions"):
        executor.prepare([], [], [Begin(3, (1,), 50)])
    assert np.array_equal(executor._prefixes._blocks[1], kept)
    assert list(executor._prefixes._blocks) == [1]


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_a_session_goes_on_from_the_positions_of_another(cuts, weights):
    cut = cuts("llama", weights)
    expected, _ = cut.reference().forward(IDS)
    for shares in ([1], [1, 0, 1]):
        together = cut.executors(shares, sessions=2)
        together.sequence(IDS[:40], [33, 7], 1)
        together.sequence([*IDS[:8], 5, 5], [10], 2)
        for one in together.executors:
            one.copy(1, 2, 8, 37)
        assert np.array_equal(together.step([(2, 37, 23)], IDS[37:]), expected[37:])
        assert np.array_equal(together.step([(1, 40, 20)], IDS[40:]), expected[40:])
        for one in together.executors:
            one.close(2)
            one.copy(1, 2, 0, 60)
        assert np.array_equal(together.step([(2, 59, 1)], IDS[59:]), expected[59:])


def test_positions_that_no_session_holds_are_not_copied(cuts):
    executor = cuts("llama").executors([1], sessions=2).executors[0]
    executor.begin([(1, 0, 5)])
    for source, target, start, stop in ((2, 1, 0, 1), (1, 1, 0, 1), (1, 2, 1, 2), (1, 2, 0, 6), (1, 2, -1, 2)):
        with pytest.raises(ProtocolViolation, match=f"positions {start}..{stop} of session {source}"):
            executor.copy(source, target, start, stop)
    executor.copy(1, 2, 0, 4)
    with pytest.raises(ProtocolViolation):
        executor.copy(1, 2, 4, 3)
    with pytest.raises(Exhausted, match="2 sessions"):
        executor.copy(1, 3, 0, 4)


@pytest.mark.parametrize(("shape", "weights"), [("llama", "fp32"), ("llama", "int4"), ("qwen3", "fp32")])
def test_branches_take_rows_that_the_chain_writes_in_the_same_step(cuts, shape, weights):
    cut = cuts(shape, weights)
    chain, branch = IDS[:40], [*IDS[:30], 9, 8, 7]
    onward = [*branch, 6, 5, 4]
    along, beside = (cut.reference().forward(ids)[0] for ids in (chain, onward))
    for shares in ([1], [1, 0, 1]):
        together = cut.executors(shares, sessions=1)
        together.sequence(IDS[:27], [27], 1)
        entries = [(1, 27, 13), (100, 30, 3), (101, 40, 1)]
        rows = [*IDS[27:40], 9, 8, 7, 3]
        found = together.step(entries, rows, {100: Take(1, 0), 101: Take(1, 0)})
        assert np.array_equal(found[:13], along[27:])
        assert np.array_equal(found[13:16], beside[30:33])
        # The branch held: the chain goes on with its rows, and the slot with what both have, in one step.
        last = cut.reference().forward([*onward[:35], 1, 2])[0]
        found = together.step([(1, 33, 3), (100, 35, 2)], [6, 5, 4, 1, 2], {1: Take(100, 30), 100: Take(1, 33)})
        assert np.array_equal(found[:3], beside[33:36])
        assert np.array_equal(found[3:], last[35:])
        for one in together.executors:
            assert one.sessions == 1
            one.close(100)
            one.close(101)
        assert np.array_equal(together.step([(1, 35, 1)], [4]), beside[35:36])


def test_a_slot_that_grows_gives_up_no_row_that_the_chain_has_yet_to_take(cuts):
    cut = cuts("llama")
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 283, 600)]
    expected, _ = cut.reference().forward(ids)
    together = cut.executors([1], sessions=1, chunk=600)
    together.step([(1, 0, 500)], ids[:500])
    together.step([(1, 500, 1), (100, 501, 5)], ids[500:506], {100: Take(1, 0)})
    takes = {1: Take(100, 501), 100: Take(1, 500)}
    found = together.step([(1, 506, 10), (100, 516, 84)], ids[506:], takes)
    assert np.array_equal(found, expected[506:])


def test_rows_that_no_session_holds_are_not_taken(cuts):
    executor = cuts("llama").executors([1], sessions=1).executors[0]
    executor.begin([(1, 0, 5)])
    refused = [
        ([(2, 6, 1)], {2: Take(1, 0)}),  # more than there is
        ([(2, 3, 1)], {2: Take(1, 1)}),  # rows before those are missing
        ([(2, 3, 1)], {2: Take(9, 0)}),
        ([(1, 3, 1)], {1: Take(1, 0)}),
        ([(1, 3, 1)], {1: Take(9, 0)}),
        ([(2, 5, 1), (1, 5, 9)], {2: Take(1, 6)}),
    ]
    for entries, takes in refused:
        with pytest.raises(ProtocolViolation, match="takes"):
            executor.begin(entries, takes=takes)
    for slot in range(TREE_BRANCHES):
        executor.begin([(100 + slot, 5, 1)], takes={100 + slot: Take(1, 0)})
    with pytest.raises(Exhausted, match="branches"):
        executor.begin([(200, 5, 1)], takes={200: Take(1, 0)})
    assert executor.sessions == 1


def test_a_graph_that_is_not_the_contracts_is_corrupt(cuts, tmp_path):
    cut = cuts("llama")
    attention, mlp = (f"{segment.kind}/1" for segment in cut.manifest.layers[0].segments)
    three, one = cut.manifest.graphs[attention], cut.manifest.graphs[mlp]
    wider = cut.manifest.graphs[attention.replace("/1", "/2")]
    share = Share(device="a" * 26, heads=Range(0, 1), columns=Range(0, 1), vocab=Range(0, 1))
    stage = Stage(layers=Range(0, 1), shares=(share,), topology="mesh")
    swaps = [one, three[:2], three[::-1], (three[0], wider[1], three[2]), (one[0], *three[1:])]
    for number, swapped in enumerate(swaps):
        manifest = msgspec.structs.replace(cut.manifest, graphs=cut.manifest.graphs | {attention: swapped})
        with pytest.raises(InvalidDocument if len(swapped) != 3 else Corrupt):
            load_shard(
                manifest,
                stage,
                share,
                open_piece=cut.store.open,
                folder=tmp_path / f"{number}",
                progress=lambda *_: None,
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embedding_rows(tmp_path, dtype):
    path = make_llama(tmp_path / "checkpoint", dtype=dtype)
    store = PieceStore(tmp_path / "store")
    manifest = partition(path, store, name="m", numeric_class=numeric_class(path, "fp32"))
    table = EmbeddingTable(manifest, store.open)
    ids = [0, 282, 17, 17, 200]
    found = np.empty((7, 64), np.float32)
    table.rows(ids, found)
    weights = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).get_input_embeddings().weight
    assert np.array_equal(found[:5], weights.detach()[ids].float().numpy())


def test_where_formats_mix_a_share_needs_the_pieces_of_both_and_no_others(cuts, tmp_path):
    cut = cuts("llama", "mixed")
    plan = cut.plan([3, 1])
    for number, share in enumerate(plan.stages[0].shares):
        opened = set()

        def open_piece(digest: str, seen: set[str] = opened) -> memoryview:
            seen.add(digest)
            return cut.store.open(digest)

        shard = load_shard(
            cut.manifest,
            plan.stages[0],
            share,
            open_piece=open_piece,
            folder=tmp_path / f"{number}",
            progress=lambda *_: None,
        )
        rest = {piece.digest for piece in cut.manifest.embedding.pieces} | {
            piece.digest for tables in cut.manifest.ropes.values() for one in tables for piece in (one.cos, one.sin)
        }
        needed = {piece.digest for piece in needed_pieces(cut.manifest, plan, share.device)}
        tokenizer = {piece.digest for piece in cut.manifest.tokenizer.values()}
        assert opened - rest == needed - rest - tokenizer
        for one, other in zip(shard.segments, shard.prompt, strict=True):
            assert one.sessions[0] is not other.sessions[0]
            if one.attends:
                assert one.sessions[1] is other.sessions[1]


def test_roles_that_the_class_does_not_have_are_refused(cuts):
    mixed, plain = (cuts("llama", weights).executors([1]).executors[0] for weights in ("mixed", "fp32"))
    with pytest.raises(ProtocolViolation, match="a step of role any; those of this class are prompt, generated"):
        mixed.begin([(1, 0, 1)])
    with pytest.raises(ProtocolViolation, match="a step of role prompt; those of this class are any"):
        plain.begin([(1, 0, 1)], "prompt")
    assert mixed.begin([(1, 0, 1)], "prompt").role == "prompt"
