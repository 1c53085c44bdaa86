"""Options of commands that draft, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="What guesses for this model where it runs: ngram (what followed earlier in the text), early:K (its first"
        " K layers), a MODEL of the same tokenizer, or none. Default: none.",
        show_default=False,
    ),
]
WindowOption = Annotated[
    int,
    typer.Option(
        "--window",
        min=0,
        max=64,
        help="Guessed tokens verified at a time, at most. Default: as measured.",
        show_default=False,
    ),
]
DraftModeOption = Annotated[
    str,
    typer.Option(
        "--draft-mode",
        help="auto (by measurement); plain (no guesses); own (the verifier guesses); sync, ahead, edge or branch (this"
        " device guesses: after each answer, on during the flight, branches kept here, branches queued there).",
    ),
]
AwayOption = Annotated[
    str,
    typer.Option(
        "--away",
        help="While the verifier is away: wait for it, go on with the local model (marked in the answer), or fail. A"
        " request may say otherwise.",
    ),
]
WaitOption = Annotated[float, typer.Option("--wait", min=0, max=86400, help="Seconds to wait for a verifier.")]
DraftMemoryOption = Annotated[
    str | None,
    typer.Option("--draft-memory", help="Memory of the device for drafting. Default: its budget.", show_default=False),
]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        "--verifier",
        help="Verify at this URL instead, under the name --as. One that ends in /verify is asked by rounds (deploy/ray;"
        " any temperature), another one by OpenAI's API (vLLM, llama.cpp or another Ganglion; greedy only). Its key is"
        " read on the device from GANGLION_VERIFIER_KEY.",
        show_default=False,
    ),
]
AsOption = Annotated[
    str | None,
    typer.Option(
        "--as", help="Name of the --verifier's model in the API here, and there in OpenAI's API.", show_default=False
    ),
]
