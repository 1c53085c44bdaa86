"""Of a repository only the checkpoint's own files are read, or one GGUF file; never pickles, never code."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ganglion.partitioner.sources.choice import choose, matches_variant, shards
from ganglion.wire.errors import GanglionError, InvalidDocument, InvalidRequest, NotFound, Unsupported


@dataclass(frozen=True)
class Listed:
    size: int


def listed(*names: str, **sizes: int) -> dict[str, Listed]:
    return {name: Listed(10) for name in names} | {name: Listed(size) for name, size in sizes.items()}


CHECKPOINT = ("config.json", "tokenizer.json", "model.safetensors", "README.md", "pytorch_model.bin", "modeling_x.py")


def test_a_checkpoint_is_its_configuration_tokenizer_license_and_weights() -> None:
    choice = choose(listed(*CHECKPOINT, "LICENSE.txt", "consolidated.safetensors", "x.Q4_0.gguf"), None, "o/n")
    assert choice.small == ("config.json", "tokenizer.json", "LICENSE.txt")
    assert choice.weights == ("model.safetensors",)
    indexed = choose(listed("config.json", "model.safetensors.index.json", "model-1.safetensors"), None, "o/n")
    assert (indexed.index, indexed.weights) == ("model.safetensors.index.json", ())


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (("m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"), None, "m-Q4_K_M.gguf"),
        (("m-Q4_0.gguf", "m-Q4_K_M.gguf"), "q4_0", "m-Q4_0.gguf"),
        (("m-Q4_0.gguf", "m-Q4_0_4_4.gguf", "m-IQ4_0.gguf"), "Q4_0", "m-Q4_0.gguf"),
        (("only.Q6_K.gguf", "mmproj-only.gguf", "imatrix.gguf"), None, "only.Q6_K.gguf"),
        (("a.gguf", "b.gguf"), "b.gguf", "b.gguf"),
        ((*CHECKPOINT, "m.Q8_0.gguf"), "Q8_0", "m.Q8_0.gguf"),
        (("Q2_K/m-Q2_K.gguf", "Q3_K_S/m-Q3_K_S.gguf"), "Q2_K", "Q2_K/m-Q2_K.gguf"),
    ],
)
def test_the_gguf_file_of_a_variant(names: tuple[str, ...], variant: str | None, chosen: str) -> None:
    assert choose(listed(*names), variant, "o/n").gguf == chosen


@pytest.mark.parametrize(
    ("names", "variant", "error", "said"),
    [
        (("config.json", "pytorch_model.bin"), None, Unsupported, r"pickled \(pytorch_model\.bin\)"),
        (("config.json", "x.py"), None, NotFound, "no weights"),
        (("README.md",), None, NotFound, "no checkpoint"),
        (("adapter_model.safetensors", "adapter_config.json"), None, NotFound, r"neither config\.json"),
        (CHECKPOINT, "Q4_0", NotFound, "no GGUF file, so no variant 'Q4_0'"),
        (("m-Q4_0.gguf", "m-Q8_0.gguf"), None, InvalidRequest, "several GGUF files.*m-Q4_0.gguf, m-Q8_0.gguf"),
        (("m-Q4_0.gguf",), "Q5_K", NotFound, "no GGUF file of variant 'Q5_K'; there are: m-Q4_0.gguf"),
        (("a-Q4_0.gguf", "b-Q4_0.gguf"), "Q4_0", InvalidRequest, "fits a-Q4_0.gguf, b-Q4_0.gguf"),
        (("m-BF16-00001-of-00003.gguf", "m-BF16-00003-of-00003.gguf"), "BF16", NotFound, "00002-of-00003.gguf is mis"),
        (("../m-Q4_0.gguf",), "Q4_0", InvalidRequest, "every file system"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    names: tuple[str, ...], variant: str | None, error: type[GanglionError], said: str
) -> None:
    with pytest.raises(error, match=said):
        choose(listed(*names), variant, "o/n")


def test_a_split_gguf_file_comes_in_all_its_parts() -> None:
    parts = ("b/m-BF16-00001-of-00002.gguf", "b/m-BF16-00002-of-00002.gguf")
    choice = choose(listed(*parts, "m-Q8_0.gguf"), "BF16", "o/n")
    assert (choice.weights, choice.gguf) == (parts, parts[0])
    assert choose(listed(*parts), None, "o/n").gguf == parts[0]


def test_files_too_large_for_what_they_are() -> None:
    files = listed("config.json", "model.safetensors") | {"tokenizer.json": Listed(65 << 20)}
    with pytest.raises(InvalidDocument, match=r"tokenizer\.json has 68157440 bytes, at most 67108864"):
        choose(files, None, "o/n")


def test_an_index_names_plain_files_that_are_there() -> None:
    files = listed("a.safetensors", "b.safetensors")
    assert shards({"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}, files, "o/n") == (
        "a.safetensors",
        "b.safetensors",
    )
    for bad in ("../a.safetensors", "/a.safetensors", "a.bin", "x/a.safetensors", "con.safetensors"):
        with pytest.raises(InvalidRequest):
            shards({"x": bad}, files, "o/n")
    with pytest.raises(NotFound, match="does not hold"):
        shards({"x": "c.safetensors"}, files, "o/n")
    with pytest.raises(InvalidDocument, match="for each tensor"):
        shards(["a"], files, "o/n")


def test_variants_are_whole_words() -> None:
    assert matches_variant("llama.Q4_K_M.gguf", "q4_k_m")
    assert not matches_variant("llama.Q4_K_M.gguf", "Q4_K")
    assert not matches_variant("llama-3-8b.gguf", "lama")
