"""E1: one grammar for models' names; what is not canonical is refused with the reason."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import string

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.partitioner.sources import LocalPath, Name, Repository, parse_reference, parse_repository
from ganglion.partitioner.sources.reference import check_file
from ganglion.wire.errors import InvalidRequest

GOOD = {
    "org/name": Repository("org", "name"),
    "Qwen/Qwen3-0.6B": Repository("Qwen", "Qwen3-0.6B"),
    "org/name@v1.0": Repository("org", "name", "v1.0"),
    "org/name@refs/pr/1": Repository("org", "name", "refs/pr/1"),
    "org/name:Q4_K_M": Repository("org", "name", None, "Q4_K_M"),
    "org/name@main:Q8_0": Repository("org", "name", "main", "Q8_0"),
    "hf.co/org/name:Q4_0": Repository("org", "name", None, "Q4_0"),
    "https://huggingface.co/org/name": Repository("org", "name"),
    "/data/model": LocalPath("/data/model"),
    "./org/name": LocalPath("./org/name"),
    "../models": LocalPath("../models"),
    "~/models": LocalPath("~/models"),
    "model.gguf": LocalPath("model.gguf"),
    "demo": Name("demo"),
    "llama-3.2-1b:q4_0": Name("llama-3.2-1b:q4_0"),
}
REFUSED = {
    "../../etc/passwd": "org/name",
    "/etc/passwd": "org/name",
    "org/..": "begins or ends",
    "org/../name": "org/name",
    "..%2f..": "org/name",
    "org/%2e%2e": "'%'",
    "a//b": "org/name",
    "a/": "repository is empty|name is empty",
    "/b": "organization is empty",
    "org/na\0me": r"U\+0000",
    "org/na\nme": r"U\+000A",
    "org/\u2024\u2024": r"U\+2024",
    "org/\uff0e\uff0e": r"U\+FF0E",
    "org/caf\xe9": r"U\+00E9",
    "org/na\u202eme": r"U\+202E",
    "org/CON": "device on Windows",
    "nul.txt/name": "device on Windows",
    "org/name:COM1": "device on Windows",
    "C:\\models\\name": "backslash",
    "org\\name": "backslash",
    "org/" + "a" * 97: "97 characters, at most 96",
    "a/" * 2048: "4096 characters, at most 512",
    "org/name.git": r"\.git",
    "org/na--me": "holds --",
    "org/-name": "begins or ends",
    "org/name.": "begins or ends",
    "org/name ": "' '",
    "org/name@": "no branch, tag or commit",
    "org/name@../main": "no branch, tag or commit",
    "org/name@a//b": "no branch, tag or commit",
    "org/name@-x": "no branch, tag or commit",
    "org/name@main.lock": "no branch, tag or commit",
    "org/name@" + "a" * 200: "no branch, tag or commit",
    "org/name:": "variant is empty",
    "org/name:a/b": "org/name|'/'",
    "org/name:../x": "org/name|'/'",
    "a/b/c": "org/name",
    "": "empty",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_models_may_be_called(text: str) -> None:
    assert parse_reference(text) == GOOD[text]


@pytest.mark.parametrize("text", REFUSED)
def test_E1_what_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=REFUSED[text]) as caught:
        parse_repository(text)
    assert len(str(caught.value)) < 300
    with pytest.raises(InvalidRequest):
        parse_repository(f"hf.co/{text}")


def test_the_name_in_the_api() -> None:
    assert parse_repository("Qwen/Qwen3-0.6B").model_name == "qwen3-0.6b"
    assert parse_repository("b/Llama-3.2-1B-Instruct-GGUF:Q4_0").model_name == "llama-3.2-1b-instruct:q4_0"
    assert parse_repository("b/x@v1:model-Q8_0.gguf").model_name == "x:model-q8_0"


@pytest.mark.parametrize("path", ["../x", "a/../b", "/a", "a//b", "a\\b", "a\0", ".hidden", "aux.gguf", "a" * 600, ""])
def test_E1_files_of_a_repository(path: str) -> None:
    with pytest.raises(InvalidRequest):
        check_file(path)
    assert check_file("Q4_0/model-Q4_0.gguf")


@settings(deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + "-_./@:%\\ \0é․~", max_size=24))
def test_every_text_is_parsed_or_refused_and_what_is_parsed_says_itself(text: str) -> None:
    try:
        found = parse_reference(text)
    except InvalidRequest:
        return
    if isinstance(found, Repository):
        validate_repo_id(found.id)
        assert parse_repository(str(found)) == found
        assert ".." not in str(found).split("/")
    else:
        assert found.text == text
