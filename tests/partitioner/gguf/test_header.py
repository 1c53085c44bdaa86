"""Hostile and broken GGUF headers: an error of the tree that names file and figure, in time and memory of the file."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.gguf.header import open_gguf
from ganglion.wire.errors import Corrupt, GanglionError, InvalidDocument, NotFound, Unsupported

HUGE = 1 << 60


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


def document(
    *parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF", data: int = 256
) -> bytes:
    header = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return header + bytes(-len(header) % 32 + data)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


BAD: dict[str, tuple[bytes, type[Exception], str]] = {
    "short": (b"GGUF", Corrupt, "4 bytes, a GGUF file has at least 24"),
    "magic": (document(magic=b"GGML"), InvalidDocument, "begins with b'GGML'"),
    "version 1": (document(version=1), Unsupported, "GGUF version 1; supported are 2, 3"),
    "big-endian": (document(version=3 << 24), Unsupported, "GGUF version 3, big-endian"),
    "2^60 tensors": (document(tensors=HUGE), InvalidDocument, "1152921504606846976 tensors, at most"),
    "a million tensors": (document(tensors=1 << 20), Corrupt, "1048576 tensors in .* bytes"),
    "2^60 keys": (document(keys=HUGE), InvalidDocument, "1152921504606846976 metadata keys, at most"),
    "keys past the end": (document(keys=65000), Corrupt, "65000 metadata keys in"),
    "endless key": (document(text("", HUGE), keys=1), InvalidDocument, "a metadata key has 1152921504606846976 bytes"),
    "endless string": (document(entry("k", 8, text("", HUGE)), keys=1), InvalidDocument, "metadata k has 11529215"),
    "string past the end": (document(entry("k", 8, text("x", 9999)), keys=1), Corrupt, "metadata k needs 9999 bytes"),
    "not UTF-8": (document(entry("k", 8, text(b"\xff\xfe")), keys=1), Corrupt, "metadata k is not UTF-8"),
    "key not UTF-8": (document(text(b"\xff"), keys=1), Corrupt, "a metadata key is not UTF-8"),
    "key twice": (document(*[entry("k", 0, b"\1")] * 2, keys=2), InvalidDocument, "metadata key 'k' twice"),
    "value of no type": (document(entry("k", 13, b"\1"), keys=1), InvalidDocument, "has the unknown type 13"),
    "neither true nor false": (document(entry("k", 7, b"\2"), keys=1), InvalidDocument, "metadata k is the boolean 2"),
    "array in an array": (document(entry("k", 9, array(9, 1)), keys=1), InvalidDocument, "an array of type 9"),
    "2^60 numbers": (document(entry("k", 9, array(0, HUGE)), keys=1), InvalidDocument, "1152921504606846976 numbers"),
    "numbers past the end": (document(entry("k", 9, array(10, 999)), keys=1), Corrupt, "999 numbers in metadata k in"),
    "2^60 strings": (document(entry("k", 9, array(8, HUGE)), keys=1), InvalidDocument, "1152921504606846976 strings"),
    "strings past the end": (document(entry("k", 9, array(8, 4000)), keys=1), Corrupt, "4000 strings in metadata k"),
    "an endless string in an array": (
        document(entry("k", 9, array(8, 2, text("a") + text("", HUGE))), keys=1), InvalidDocument, "a string in",
    ),
    "a string of bytes in an array": (
        document(entry("k", 9, array(8, 1, text(b"\xc3"))), keys=1), Corrupt, "a string in metadata k is not UTF-8",
    ),
    "alignment 0": (document(entry("general.alignment", 4, bytes(4)), keys=1), InvalidDocument, "general.alignment 0"),
    "alignment 24": (
        document(entry("general.alignment", 4, struct.pack("<I", 24)), keys=1), InvalidDocument, "general.alignment 24",
    ),
    "alignment of another type": (
        document(entry("general.alignment", 8, text("32")), keys=1), InvalidDocument, "general.alignment '32'",
    ),
    "no dimensions": (document(tensor(shape=()), tensors=1), InvalidDocument, "tensor t has 0 dimensions"),
    "2^31 dimensions": (document(tensor(dimensions=1 << 31), tensors=1), InvalidDocument, "has 2147483648 dimensions"),
    "size 0": (document(tensor(shape=(0,)), tensors=1), InvalidDocument, r"tensor t has shape \[0\]"),
    "negative size": (document(tensor(shape=(2**64 - 32,)), tensors=1), InvalidDocument, r"shape \[184467440"),
    "sizes that overflow": (document(tensor(shape=(1 << 32, 1 << 32)), tensors=1), InvalidDocument, "1 to .* elements"),
    "type 4711": (document(tensor(kind=4711), tensors=1), Unsupported, "tensor t has the unknown type 4711"),
    "half a block": (document(tensor(shape=(40,), kind=2), tensors=1), InvalidDocument, "Q4_0 has rows of 40, blocks"),
    "offset off the alignment": (document(tensor(offset=7), tensors=1), InvalidDocument, "byte 7, no multiple"),
    "past the end": (document(tensor(shape=(65,)), tensors=1), Corrupt, "ends at byte 260 of 256"),
    "offset beyond the file": (document(tensor(offset=HUGE), tensors=1), Corrupt, "ends at byte 1152921504606847104"),
    "overlap": (document(tensor("a"), tensor("b", offset=64), tensors=2), Corrupt, "tensor b starts at byte 64"),
    "name twice": (document(tensor(), tensor(offset=128), tensors=2), InvalidDocument, "tensor t twice"),
    "endless name": (document(tensor("x" * 300), tensors=1), InvalidDocument, "a tensor's name has 300 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(case, tmp_path):
    data, error, said = BAD[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=said) as caught:
            open_gguf(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(caught.value)


def good(path: Path, **metadata: Callable[[gguf.GGUFWriter], Any]) -> bytes:
    """A whole tiny llama with a vocabulary, some metadata replaced."""
    writer = gguf.GGUFWriter(path, "llama")
    known: dict[str, Callable[[gguf.GGUFWriter], Any]] = {
        "layers": lambda w: w.add_block_count(1),
        "context": lambda w: w.add_context_length(64),
        "hidden": lambda w: w.add_embedding_length(32),
        "feed": lambda w: w.add_feed_forward_length(32),
        "heads": lambda w: w.add_head_count(2),
        "epsilon": lambda w: w.add_layer_norm_rms_eps(1e-5),
        "model": lambda w: w.add_tokenizer_model("gpt2"),
        "pre": lambda w: w.add_tokenizer_pre("llama-bpe"),
        "tokens": lambda w: w.add_token_list([chr(97 + n) for n in range(24)] + ["ab", "<s>"]),
        "types": lambda w: w.add_token_types([1] * 25 + [3]),
        "merges": lambda w: w.add_token_merges(["a b"]),
        "bos": lambda w: w.add_bos_token_id(25),
        "eos": lambda w: w.add_eos_token_id(25),
    }
    for add in (known | metadata).values():
        add(writer)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((32, 32), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((26, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("metadata", "error", "said"),
    [
        ({"layers": lambda w: None}, InvalidDocument, r"llama\.block_count is missing"),
        ({"layers": lambda w: w.add_string("llama.block_count", "1")}, InvalidDocument, r"\.block_count is '1', an"),
        ({"layers": lambda w: w.add_float32("llama.block_count", 1.5)}, InvalidDocument, r"\.block_count is '1\.5'"),
        ({"heads": lambda w: w.add_int32("llama.attention.head_count", -2)}, InvalidDocument, "head_count is '-2'"),
        ({"heads": lambda w: w.add_head_count(0)}, InvalidDocument, "head_count is '0'"),
        ({"heads": lambda w: w.add_head_count(3)}, InvalidDocument, "has 32 rows for 3 heads"),
        ({"heads": lambda w: w.add_head_count([1, 2])}, Unsupported, "head_count differs from layer to layer"),
        ({"epsilon": lambda w: w.add_layer_norm_rms_eps(float("nan"))}, InvalidDocument, "epsilon is 'nan'"),
        ({"rope": lambda w: w.add_string("llama.rope.scaling.type", "ntk")}, Unsupported, "rope scaling 'ntk';"),
        ({"type": lambda w: w.add_type("adapter")}, Unsupported, "of type 'adapter'"),
        ({"model": lambda w: w.add_tokenizer_model("bert")}, Unsupported, "tokenizer 'bert'; supported are gpt2"),
        ({"pre": lambda w: w.add_tokenizer_pre("new")}, Unsupported, r"pre 'new'; supported are llama-bpe,"),
        ({"pre": lambda w: None}, Unsupported, r"pre '\(none named\)'"),
        ({"merges": lambda w: w.add_token_merges(["a zz"])}, InvalidDocument, "merge 'a zz' is not of two tokens"),
        ({"types": lambda w: w.add_token_types([1])}, InvalidDocument, "1 token types for 26 tokens"),
        ({"tokens": lambda w: w.add_token_list(["a"] * 26)}, InvalidDocument, "token 'a' twice"),
        ({"tokens": lambda w: None}, InvalidDocument, "a vocabulary of 0 tokens"),
        ({"bos": lambda w: w.add_bos_token_id(26)}, InvalidDocument, "bos_token_id is 26, the vocabulary has 26"),
        (
            {"tokens": lambda w: w.add_token_list([f"t{n}" for n in range(27)])},
            InvalidDocument,
            "a vocabulary of 27 tokens and an embedding of 26 rows",
        ),
        ({"split": lambda w: w.add_uint16("split.count", 7)}, InvalidDocument, "one of 7 files"),
    ],
)  # fmt: skip
def test_bad_metadata(metadata, error, said, tmp_path):
    good(tmp_path / "bad.gguf", **metadata)
    with pytest.raises(error, match=said) as caught:
        open_checkpoint(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value)


def test_a_long_piece_is_refused(tmp_path):
    good(
        tmp_path / "bad.gguf",
        model=lambda w: w.add_tokenizer_model("llama"),
        tokens=lambda w: w.add_token_list([chr(97 + n) for n in range(25)] + ["a" * 1_000_000]),
        types=lambda w: w.add_token_types([1] * 26),
        scores=lambda w: w.add_token_scores([0.0] * 26),
    )
    with pytest.raises(InvalidDocument, match="token 25 has 1000000 characters, at most 256"):
        open_checkpoint(tmp_path / "bad.gguf")


def test_the_good_one_opens_and_an_absent_one_does_not(tmp_path):
    good(tmp_path / "good.gguf")
    assert len(open_checkpoint(tmp_path / "good.gguf").tensors) == 11
    with pytest.raises(NotFound, match="no such checkpoint"):
        open_checkpoint(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("hostile") / "good.gguf"
    return path.with_name("changed.gguf"), good(path)


@settings(max_examples=150, deadline=2000)
@given(st.data())
def test_changed_files_give_errors_of_the_tree_or_open(whole, data):
    path, content = whole
    changed = bytearray(content)
    header = len(content) - 11 * 4096  # most bytes are numbers; changes there prove little
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(header, 1500)))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\x7f" * 8, bytes(8), b"\xff" * 8, b"\1"]))
        changed[at : at + len(value)] = value
    cut = data.draw(st.sampled_from([0, 0, 1, 40, 4000, len(content) - 100]))
    path.write_bytes(changed[: len(changed) - cut])
    with contextlib.suppress(GanglionError):
        for tensor in open_checkpoint(path).tensors.values():
            assert np.isfinite(tensor.rows(0, 1)).all()


KEYS = [
    "general.architecture", "general.type", "general.alignment", "split.count", "split.no", "split.tensors.count",
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length",
    "llama.attention.value_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
    "llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear",
    "llama.rope.scaling.original_context_length", "llama.expert_count", "llama.expert_used_count",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.huggingface.json",
]  # fmt: skip
VALUES = st.one_of(
    st.builds(
        lambda v: struct.pack("<I", 8) + text(v), st.sampled_from(["", "x", "yarn", "longrope", "llama", "gpt2"])
    ),
    st.builds(lambda v: struct.pack("<Iq", 11, v), st.sampled_from([-1, 0, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**62])),
    st.builds(lambda v: struct.pack("<If", 6, v), st.sampled_from([0.0, -1.0, 0.5, 1e30, float("nan"), float("inf")])),
    st.builds(lambda v: struct.pack("<IB", 7, v), st.booleans()),
    st.builds(
        lambda v: struct.pack("<I", 9) + array(11, len(v), struct.pack(f"<{len(v)}q", *v)),
        st.lists(st.integers(-3, 70), max_size=27),
    ),
    st.builds(
        lambda v: struct.pack("<I", 9) + array(6, len(v), struct.pack(f"<{len(v)}f", *v)),
        st.lists(st.floats(width=32), max_size=3),
    ),
    st.builds(
        lambda v: struct.pack("<I", 9) + array(8, len(v), b"".join(map(text, v))),
        st.lists(st.sampled_from(["", "a", "a b", "ab"]), max_size=27),
    ),
)


@settings(max_examples=200, deadline=2000)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_metadata_of_any_type_gives_errors_of_the_tree_or_opens(whole, replaced):
    path, content = whole
    opened = open_gguf(path.with_name("good.gguf"))
    keys = 24  # after magic, version and the two counts
    at, kept = keys, []
    for key in opened.metadata:
        length = 8 + len(key.encode())
        end = at + length + _value_bytes(bytes(opened.header), at + length)
        if key not in replaced:
            kept.append(bytes(opened.header[at:end]))
        at = end
    kept += [text(key) + value for key, value in replaced.items()]
    header = content[:16] + struct.pack("<Q", len(kept)) + b"".join(kept) + bytes(opened.header[at:])
    start = -(-opened.header.nbytes // 32) * 32
    path.write_bytes(header + bytes(-len(header) % 32) + content[start:])
    with contextlib.suppress(GanglionError):
        assert open_checkpoint(path).tensors


def _value_bytes(header: bytes, at: int) -> int:
    """Bytes of the value (with its type) at a position of a good header."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    (kind,) = struct.unpack_from("<I", header, at)
    if kind == 8:
        return 12 + int(struct.unpack_from("<Q", header, at + 4)[0])
    if kind != 9:
        return 4 + widths[kind]
    inner, count = struct.unpack_from("<IQ", header, at + 4)
    if inner != 8:
        return 16 + count * widths[inner]
    end = at + 16
    for _ in range(count):
        end += 8 + struct.unpack_from("<Q", header, end)[0]
    return end - at
