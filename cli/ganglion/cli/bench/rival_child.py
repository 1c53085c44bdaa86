"""A library that a deployment is compared with, in a process of its own: `… rival_child NAME MODEL THREADS CONTEXT`.

Says on standard output, in JSON, what it is; then answers a line for each line. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Model(Protocol):
    """A loaded model. `begin` runs a prompt in an empty cache and gives the first token, `step` runs one more."""

    about: dict[str, Any]

    def begin(self, prompt: Sequence[int]) -> int:
        """The first greedy token."""
        ...

    def step(self, token: int) -> int:
        """The next one."""
        ...


class LlamaCpp:
    """llama-cpp-python."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        from ganglion.cli.bench.rivals import built_with

        self._llama: Any = llama_cpp.Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        self.about = {"instructions": built_with(llama_cpp.llama_print_system_info().decode())}

    def begin(self, prompt: Sequence[int]) -> int:
        """The first greedy token."""
        self._llama.reset()
        return self.step(*prompt)

    def step(self, *tokens: int) -> int:
        """The token after these."""
        self._llama.eval(tokens)
        return int(self._llama.sample(temp=0.0))


class Transformers:
    """transformers on torch's CPU, in bfloat16 or float32."""

    def __init__(self, path: str, threads: int, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        loader: Any = transformers.AutoModelForCausalLM
        self._model: Any = loader.from_pretrained(path, dtype=kind, local_files_only=True).eval()
        self._cache: Any = None
        capability = torch.backends.cpu.get_cpu_capability()
        self.about = {"instructions": f"torch for {capability}", "bits": 8 * kind.itemsize}

    def begin(self, prompt: Sequence[int]) -> int:
        """The first greedy token."""
        self._cache = None
        return self.step(*prompt)

    def step(self, *tokens: int) -> int:
        """The token after these."""
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


def answer(model: Model, question: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The figures that a line asks for."""
    started = clock()
    ids = [model.begin(question["prompt"])]
    at_s = [clock() - started]
    if question["op"] == "prefill":
        return {"seconds": at_s[0]}
    while len(ids) < question["tokens"]:
        ids.append(model.step(ids[-1]))
        at_s.append(clock() - started)
    return {"ids": ids, "ttft_s": at_s[0], "tpot_s": (at_s[-1] - at_s[0]) / (len(ids) - 1)}


def main(name: str, path: str, threads: str, context: str) -> None:
    """Answer until the input ends."""
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind = name.rpartition("-")[2]
    model: Any = (
        LlamaCpp(path, int(threads), int(context))
        if name == "llama-cpp-python"
        else Transformers(path, int(threads), kind)
    )
    print(json.dumps(model.about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
