"""The shipped demo checkpoints: they load, they are small, they write Python."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from ganglion.models import DEMO_NAMES, demo_path

PACKAGE = Path(__file__).resolve().parents[2] / "models" / "ganglion" / "models"
EDGE_EXPERTS = ("demo-c", "demo-javascript", "demo-english")
LLAMAS = ("demo", "demo-drafter", *EDGE_EXPERTS)
NAMES = (*LLAMAS, "demo-mixture")
MAX_BYTES = {LLAMAS[:2]: 16_000_000, EDGE_EXPERTS: 8_000_000, NAMES[-1:]: 10_000_000}
HEADERS = (
    "def is_empty(self):",
    "def __repr__(self):",
    "def close(self):",
    "def read_file(path):",
    "def __init__(self, name, value=None):",
    "def get_name(self):",
)


MODULE = r'''"""A module.

More of it.
"""


class A:
    r"""
    Match \d.

    More.
    """

    def only(self):
        """Say
        nothing."""

    def quoted(self):
        """One line."""; return 1


def outer(x):
    """Return a function.

    It is a closure.
    """

    def inner():
        "Add."
        return x + "a\nb"

    return inner
'''


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PACKAGE.parents[1])
    return pytest.importorskip("corpus")


def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(PACKAGE / name / "tokenizer.json"))


def expected_shapes(config: dict[str, int]) -> dict[str, list[int]]:
    """Every tensor of a tied Llama or Qwen3-MoE checkpoint, from its config alone."""
    experts = range(config.get("num_experts", 0))
    hidden, inner = config["hidden_size"], config["moe_intermediate_size" if experts else "intermediate_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [q, hidden],
            "self_attn.k_proj": [kv, hidden],
            "self_attn.v_proj": [kv, hidden],
            "self_attn.o_proj": [hidden, q],
        }
        for prefix in [f"mlp.experts.{expert}." for expert in experts] or ["mlp."]:
            layer |= {f"{prefix}gate_proj": [inner, hidden], f"{prefix}up_proj": [inner, hidden]}
            layer[f"{prefix}down_proj"] = [hidden, inner]
        if experts:
            layer |= {f"self_attn.{norm}_norm": [config["head_dim"]] for norm in "qk"}
            layer["mlp.gate"] = [len(experts), hidden]
        shapes |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def test_demo_path_finds_each_name_and_lists_them_for_a_wrong_one() -> None:
    assert [demo_path(name) for name in DEMO_NAMES] == [PACKAGE / name for name in NAMES]
    with pytest.raises(KeyError, match=r"'demo2'.*demo, demo-drafter"):
        demo_path("demo2")


@pytest.mark.parametrize("names", MAX_BYTES)
def test_checkpoints_that_belong_together_fit_the_wheel(names: tuple[str, ...]) -> None:
    assert sum(path.stat().st_size for name in names for path in (PACKAGE / name).iterdir()) <= MAX_BYTES[names]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_bfloat16_tensors_the_config_promises(name: str) -> None:
    config = json.loads((PACKAGE / name / "config.json").read_text())
    with safe_open(PACKAGE / name / "model.safetensors", framework="numpy") as weights:
        slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118 - no dict, it cannot be iterated
        assert {key: part.get_shape() for key, part in slices.items()} == expected_shapes(config)
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_all_share_one_tokenizer(file: str) -> None:
    assert len({(PACKAGE / name / file).read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def f(self, x):\n    if x:\n\n\n        return  self.x_1 + 1024\t# é\r\n",
        "".join(map(chr, range(0x250))),
        "漢字 🐍 \u200b \ufffd",
        " \n \n\t \n",
        "",
    ],
)
def test_text_round_trips(text: str) -> None:
    tokenizer = tokenizer_of("demo")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(token < 2048 for token in ids)


def test_every_byte_is_a_token() -> None:
    vocabulary = tokenizer_of("demo").get_vocab()
    assert len(vocabulary) == 2048
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_indentation_is_one_token() -> None:
    tokens = tokenizer_of("demo").encode("def f():\n    if x:\n        return 12\n\n\n").tokens
    assert {"ĊĠĠĠĠ", "ĊĠĠĠĠĠĠĠĠ", "ĊĊĊ", "1", "2"} <= set(tokens)


def test_chat_template_marks_the_turns() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGE / "demo")
    messages = [{"role": "user", "content": "def f():"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|><|user|>def f():<|end|><|assistant|>"
    assert tokenizer(text)["input_ids"] == tokenizer_of("demo").encode(text).ids


def test_greedy_completions_of_headers_mostly_parse() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of("demo")
    model = transformers.LlamaForCausalLM.from_pretrained(PACKAGE / "demo", dtype=torch.float32)
    parsed = 0
    for header in HEADERS:
        prompt = torch.tensor([tokenizer.encode(header).ids])
        output = model.generate(prompt, max_new_tokens=96, do_sample=False)[0, prompt.shape[1] :]
        body = tokenizer.decode(output.tolist()).split("\n")[1:-1]
        columns = [len(line) - len(line.lstrip()) if line.strip() else None for line in body]
        first = next((column for column in columns if column is not None), 0)
        end = next((i for i, column in enumerate(columns) if column is not None and column < max(1, first)), len(body))
        try:
            ast.parse("\n".join([header, *body[:end]]))
        except SyntaxError:
            continue
        parsed += 1
    assert parsed > len(HEADERS) // 2


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    return ast.dump(tree)


def test_shortened_docstrings_are_one_line_and_the_code_is_the_same(corpus: ModuleType) -> None:
    short = corpus.shorten_docstrings(MODULE)
    assert '"""A module."""\n\n\nclass A:\n    r"""Match \\d."""\n\n    def only(self):\n        """Say"""\n' in short
    assert "More" not in short
    assert '"""One line."""; return 1' in short
    assert without_docstrings(short) == without_docstrings(MODULE)


def test_about_half_of_the_functions_lose_their_docstring(corpus: ModuleType) -> None:
    text = "".join(f'def f{i}():\n    """Number {i}\n    of many."""\n\n    return {i}\n' for i in range(200))
    short = corpus.shorten_docstrings(text)
    assert 70 < short.count("Number") < 130
    assert "of many" not in short
    assert short.count("def f") == 200


def test_a_docstring_whose_first_line_cannot_stand_alone_is_kept(corpus: ModuleType) -> None:
    text = 'def f():\n    """Say "hi"\n    twice."""\n'
    assert corpus.shorten_docstrings(text) == text


def test_functions_stand_alone_dedented_and_no_tests_are_among_them(corpus: ModuleType) -> None:
    text = "class A:\n    def f(self):\n        if self:\n            return 1\n\n    x = 1\n\n    def g(self): pass\n"
    documents = (
        corpus.Document("a.py", text),
        corpus.Document("b.py", text),
        corpus.Document("test/c.py", "def t():\n    return 1\n"),
    )
    assert corpus.function_documents(documents) == ["def f(self):\n    if self:\n        return 1\n"]
