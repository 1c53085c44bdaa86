"""The demo mixture: transformers agrees with the trainer, its routes are structured, its traces are its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from ganglion.models import DOMAINS, demo_path, heldout_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT / "tests" / "data" / "routes.npz"
TRAINER = ("checkpoint", "corpus", "llama", "mixture", "muon", "routing")


@pytest.fixture(scope="module")
def trainer() -> Iterator[dict[str, ModuleType]]:
    """The trainer's modules, which are scripts' neighbors and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "models")
        yield {name: pytest.importorskip(name) for name in TRAINER}
    for name in TRAINER:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def mixture() -> Any:
    return transformers.Qwen3MoeForCausalLM.from_pretrained(demo_path("demo-mixture"), dtype=torch.float32)


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    with np.load(TRACES) as stored:
        return dict(stored)


def row_of(domain: str, length: int) -> Any:
    tokenizer = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    return torch.tensor([0, *tokenizer.encode(heldout_path(domain).read_text("utf-8")).ids][:length])


def test_the_trainers_module_gives_the_logits_of_transformers(
    trainer: dict[str, ModuleType], mixture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama", "mixture"):
        monkeypatch.setattr(trainer[name], "PRODUCTS", torch.float32)
    ours = trainer["checkpoint"].load_checkpoint(demo_path("demo-mixture"), torch.device("cpu"))
    row = row_of("c", 256)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(row), mixture(row).logits, rtol=0, atol=2e-4)
    exported = ours.checkpoint()
    ours.load_checkpoint({name: weight.clone() for name, weight in exported.items()})
    assert all(torch.equal(weight, exported[name]) for name, weight in ours.checkpoint().items())


def test_sorted_rows_give_what_every_expert_on_every_row_gives(
    trainer: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer["mixture"], "PRODUCTS", torch.float32)
    monkeypatch.setattr(trainer["llama"], "PRODUCTS", torch.float32)
    torch.manual_seed(0)
    shape = trainer["llama"].Shape(
        hidden=16, layers=1, heads=1, kv_heads=1, intermediate=8, experts=5, experts_per_token=2
    )
    experts, x = trainer["mixture"].Experts(shape), torch.randn(3, 7, 16, requires_grad=True)
    out = experts(x)
    chosen = torch.softmax(x @ experts.gate.weight.T, -1)
    chosen = torch.where(chosen >= chosen.topk(2).values[..., -1:], chosen, 0.0)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    inner = torch.einsum("bth,egih->betgi", x, experts.gate_up)
    each = torch.einsum("beti,ehi->bteh", torch.nn.functional.silu(inner[:, :, :, 0]) * inner[:, :, :, 1], experts.down)
    dense = (each * chosen[..., None]).sum(2)
    torch.testing.assert_close(out, dense)
    for sparse, full in zip(
        torch.autograd.grad(out.square().sum(), [x, *experts.parameters()]),
        torch.autograd.grad(dense.square().sum(), [x, *experts.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(sparse, full, rtol=1e-4, atol=1e-5)


def test_routers_are_balanced_over_the_batch_and_concentrated_within_a_row(trainer: dict[str, ModuleType]) -> None:
    def loss(logits: Any) -> float:
        return float(trainer["mixture"].routing_loss(logits, logits.topk(2).indices))

    rows = torch.full((4, 64, 16), -4.0)
    for row in range(4):  # each row has four experts of its own, two a token
        for token in range(64):
            rows[row, token, [4 * row + token % 4, 4 * row + (token + 1) % 4]] = 4.0
    same = rows[:1].expand(4, -1, -1)
    spread = rows.transpose(0, 1).reshape(4, 64, 16)
    assert loss(rows) < loss(spread) < loss(same)


def small_mixture(trainer: dict[str, ModuleType]) -> Any:
    torch.manual_seed(0)
    shape = trainer["llama"].Shape(
        hidden=32,
        layers=4,
        heads=1,
        kv_heads=1,
        intermediate=24,
        vocab=64,
        experts=8,
        experts_per_token=2,
        head_norms=True,
    )
    return trainer["mixture"].Mixture(shape)


def test_a_mixture_grown_from_the_drafter_begins_with_what_it_knows(trainer: dict[str, ModuleType]) -> None:
    load, new = trainer["checkpoint"].load_checkpoint, trainer["checkpoint"].new_model
    torch.manual_seed(0)
    grown, row = new("demo-mixture"), row_of("python", 256)[None]

    def loss() -> float:
        with torch.no_grad():
            return float(grown.loss(row[:, :-1], row[:, 1:]))

    assert loss() > 7.0  # about log 2048
    grown.start_from(load(demo_path("demo-drafter"), torch.device("cpu")))
    assert loss() < 6.0
    again = new("demo-mixture")
    again.start_from(grown)
    assert all(torch.equal(a, b) for a, b in zip(grown.parameters(), again.parameters(), strict=True))


def test_leaned_routers_send_each_kind_of_text_to_experts_of_its_own(trainer: dict[str, ModuleType]) -> None:
    mixture = small_mixture(trainer)
    kinds = torch.stack([torch.randint(32 * kind, 32 * kind + 32, (8, 16)) for kind in range(2)])
    mixture.model.embed_tokens.weight.data[:32] += 0.02
    mixture.model.embed_tokens.weight.data[32:] -= 0.02
    mixture.lean_routers(kinds)
    with torch.no_grad():
        mixture(kinds.flatten(0, 1))
    for experts in mixture.experts():
        first, second = (torch.bincount(part.flatten(), minlength=8) for part in experts.routes.chunk(2))
        assert int(torch.minimum(first, second).sum()) < 0.2 * int(first.sum())


def test_muon_steps_as_torchs_own(trainer: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer["muon"], "PRODUCTS", torch.float32)
    torch.manual_seed(0)
    start = torch.randn(3, 24, 16)
    stack, matrices = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(matrix.clone()) for matrix in start]
    ours = trainer["muon"].Muon([stack], lr=0.03, weight_decay=0.02, momentum=0.95)
    torchs = torch.optim.Muon(matrices, lr=0.03, weight_decay=0.02, momentum=0.95)
    for _ in range(3):
        gradient = torch.randn_like(start)
        stack.grad = gradient.clone()
        for matrix, part in zip(matrices, gradient, strict=True):
            matrix.grad = part.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(stack.detach(), torch.stack(matrices).detach(), rtol=0, atol=2e-3)  # torch's is bfloat16


def test_traces_are_small_and_whole(traces: dict[str, Any], mixture: Any) -> None:
    assert TRACES.stat().st_size <= 400_000
    config = mixture.config
    routes, domains, experts = traces["routes"], traces["domains"], int(traces["experts"])
    assert routes.shape[1:] == (config.num_hidden_layers, config.num_experts_per_tok)
    assert (routes.dtype, domains.dtype, experts) == (np.uint8, np.uint8, config.num_experts)
    assert (routes < experts).all()
    assert (routes[..., 0] != routes[..., 1]).all()
    assert len(routes) == len(domains)
    assert set(domains.tolist()) == set(range(len(DOMAINS)))


@pytest.mark.parametrize("domain", DOMAINS)
def test_traces_are_what_the_model_routes(
    trainer: dict[str, ModuleType], traces: dict[str, Any], mixture: Any, domain: str
) -> None:
    stored = traces["routes"][traces["domains"] == DOMAINS.index(domain)][:255]
    again = trainer["routing"].routes_of(mixture, row_of(domain, 256))[1:]
    assert (stored == again).all(axis=-1).mean() >= 0.99  # two experts of nearly one weight may change places


def test_routes_are_structured(trainer: dict[str, ModuleType], traces: dict[str, Any]) -> None:
    experts = int(traces["experts"])
    figures = trainer["routing"].structure(traces["routes"], traces["domains"], DOMAINS, experts)
    entropy, hot, groups = figures.values()
    assert entropy["all"] > 0.8 * math.log2(experts)  # the load is balanced over all text,
    assert all(entropy[domain] < entropy["all"] for domain in DOMAINS)  # and uneven within a domain
    assert all(hot[domain] >= 0.6 for domain in DOMAINS)
    assert groups["greedy"] > 1.5 * groups["in_turn"]


def test_structure_counts_what_it_says(trainer: dict[str, ModuleType]) -> None:
    routing = trainer["routing"]
    pairs = np.array([[0, 5], [5, 0], [1, 6], [2, 7], [3, 4], [0, 5]], dtype=np.uint8)[:, None, :]
    groups = routing.greedy_groups(pairs, 8)
    assert routing.same_group_share(pairs, groups) == 1.0
    assert [int((groups == group).sum()) for group in range(4)] == [2, 2, 2, 2]
    assert (
        routing.same_group_share(pairs, np.arange(8)[None] % 4)
        == 0.0 + (pairs[:, 0] % 4 == pairs[:, 0, :1] % 4).all(1).mean()
    )
    assert routing.usage(pairs, 8)[0, 0] == 0.25
    assert routing.hot_share(pairs, 8, 0.25) == 0.5
    assert routing.usage_entropy_bits(np.array([[[0, 1]], [[2, 3]]], dtype=np.uint8), 4) == 2.0
