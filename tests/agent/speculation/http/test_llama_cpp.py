"""The real thing: llama-cpp-python's server on a GGUF of the demo model gives the tokens that llama.cpp draws alone.

Runs where llama-cpp-python[server] is installed, here or in the Python that GANGLION_LLAMA_CPP_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ganglion.models import demo_path
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.gguf.writing import write_gguf

PYTHON = os.environ.get("GANGLION_LLAMA_CPP_PYTHON") or sys.executable
HERE = sys.executable != PYTHON or all(importlib.util.find_spec(one) for one in ("llama_cpp", "sse_starlette"))
pytestmark = pytest.mark.skipif(
    not HERE,
    reason="no llama-cpp-python[server]; GANGLION_LLAMA_CPP_PYTHON may name a Python that has it",
)
PROMPTS = (
    "<|endoftext|><|user|>Write a function that sorts a list<|end|><|assistant|>",
    "def main(argv=None):\n    parser = argparse",
    "Once upon a time",
    "def fibonacci(n):\n",  # answered in other tokens than the tokenizer's
    "import os\n\n\nclass Reader:\n    def close(self):\n",
)
TOKENS = 110
START_S = 120.0
ALONE = """
import json, sys
from llama_cpp import Llama
model, prompts, most = Llama(sys.argv[1], n_ctx=1024, verbose=False), json.loads(sys.argv[2]), int(sys.argv[3])
found = []
for prompt in prompts:
    found.append([])
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token in (0, 3) or len(found[-1]) == most:
            break
        found[-1].append(token)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    return write_gguf(open_checkpoint(demo_path("demo")), path, "F16", tokenizer="superbpe")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(model), "--logits_all", "true", "--n_ctx", "1024"]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--verbose", "false"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        late = threading.Timer(START_S, process.kill)
        late.start()
        said, found = [], None
        try:
            assert process.stdout is not None
            while found is None and (line := process.stdout.readline()):
                said.append(line)
                found = re.search(r"running on (http://127\.0\.0\.1:\d+)", line)
            late.cancel()
            assert found is not None, "".join(said)
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            yield f"{found[1]}/v1"
        finally:
            late.cancel()
            process.kill()
            process.wait()
            if found is not None:
                drain.join()


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[list[int]]]:
    """Each prompt's ids, and what llama.cpp draws after them with nobody drafting."""
    tokenizer = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    command = [PYTHON, "-c", ALONE, str(model), json.dumps(prompts), str(TOKENS)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    return [[prompt, tokens] for prompt, tokens in zip(prompts, found, strict=True)]


async def test_tokens_are_llama_cpps_own(alone, url, verifier, drafted) -> None:
    dice, made, passes, drawn_alone = random.Random(7), verifier(url), 0, 0
    for prompt, true in alone:

        def draft(ids: list[int], most: int, known: tuple[int, ...] = (*prompt, *true)) -> list[int]:
            following = known[len(ids) : len(ids) + most]
            return [token if dice.random() < 0.85 else dice.randrange(4, 2048) for token in following] or [5]

        answer = await drafted(made, prompt, TOKENS, draft)
        assert answer.tokens == true
        passes += answer.finished.speculation.passes
        drawn_alone += answer.requests.drawn_alone
    count = sum(len(true) for _, true in alone)
    assert count >= 500
    assert passes < 0.6 * count
    assert 0 < drawn_alone < count / 2  # of one prompt, see above
    assert (await made.dialect()).title.startswith("echo")
