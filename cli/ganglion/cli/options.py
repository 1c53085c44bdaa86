"""Options that several commands share, with one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="GANGLION_HOME",
        help="Folder with everything Ganglion keeps. Default: $XDG_DATA_HOME/ganglion, else ~/.local/share/ganglion.",
        show_default=False,
        show_envvar=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Stable JSON on standard output instead of a table.")]
BindOption = Annotated[
    str | None,
    typer.Option(
        "--bind", help="Address that devices' ports listen on. Default: 0.0.0.0, every interface.", show_default=False
    ),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host", help="Address of the API. Default: 127.0.0.1; any other needs an API key.", show_default=False
    ),
]
PortOption = Annotated[
    int | None, typer.Option("--port", help="Port of the API. Default: 7460; 0: any free one.", show_default=False)
]
EnrolmentPortOption = Annotated[
    int | None,
    typer.Option(
        "--enrolment-port", help="Port where devices enrol. Default: 7461; 0: any free one.", show_default=False
    ),
]
FleetPortOption = Annotated[
    int | None,
    typer.Option("--fleet-port", help="Port of the coordinator. Default: 7462; 0: any free one.", show_default=False),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", help="Threads that compute here. Default: every physical core.", show_default=False),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory for deployments here, for example 4GiB. Default: decided by the agent.",
        show_default=False,
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Disk for models' pieces here and what is made from them, for example 50GiB. Default: no limit.",
        show_default=False,
    ),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option(
        "--bandwidth",
        help="Most that models' pieces may take of the network, each way, for example 20MB/s. Default: no limit.",
        show_default=False,
    ),
]
PiecePortOption = Annotated[
    int | None,
    typer.Option("--piece-port", help="Port that serves pieces. Default: any free one.", show_default=False),
]
LanesOption = Annotated[
    str | None,
    typer.Option(
        "--lanes",
        help="How devices exchange: grpc, socket (nothing else), or auto: sockets on the local network, gRPC elsewhere."
        " Default: auto.",
        show_default=False,
    ),
]
ExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help="What computes: ort, or torch with a device (cpu, cuda) and numbers (bf16, fp16, fp32), for example"
        " torch:cuda:bf16; torch is an extra of its own. Default: ort.",
        show_default=False,
    ),
]
ReadyFileOption = Annotated[
    Path | None,
    typer.Option("--ready-file", help="Write a JSON with pid and addresses here once ready.", show_default=False),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="`demo`; a repository of the Hugging Face hub, as org/name, org/name@revision or (GGUF) org/name:Q4_K_M; a"
        " folder with a checkpoint, or a .gguf file; or the name of a model that is cut or deployed."
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Weights: fp32, fp16, int8, int4, mixed (prompts in int8, answers in int4: both are held) or auto (by what"
        " was measured of the devices, see --for). Default: as deployed, else the source's own blocks, else fp32 up to"
        " 256 MiB, int4 above.",
        show_default=False,
    ),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="What --format auto chooses for: chat, one stream at a time; batch, many; draft, answers without prompts;"
        " verify, drafted tokens, of which several run at once. Default: chat.",
        show_default=False,
    ),
]
FastOption = Annotated[bool, typer.Option("--fast", help="A fast numeric class: quicker, not bit-equal between plans.")]
ExpertsOption = Annotated[
    str | None,
    typer.Option(
        "--experts",
        help="How a mixture is cut: columns (through every expert: for tensor parallelism) or whole (expert by"
        " expert: for --mode expert and --expert-memory). Default: as it is deployed or cut, else columns.",
        show_default=False,
    ),
]
ExpertMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Memory of each device for a mixture's experts, as in 4GiB: those beyond stay on its disk and are read as"
        " tokens take them. Default: for all, or for as many as fit where nothing else does.",
        show_default=False,
    ),
]
ModeOption = Annotated[
    str, typer.Option("--mode", help="auto, single, tensor, pipeline, or expert (a mixture's experts on many devices).")
]
DevicesOption = Annotated[
    str, typer.Option("--devices", help="Names of the devices to use, with commas. Default: any.", show_default=False)
]
SharesOption = Annotated[
    str,
    typer.Option(
        "--shares", help="Relative shares, one a device of --devices, with commas, as in 2,1,1.", show_default=False
    ),
]
PayloadOption = Annotated[
    str,
    typer.Option("--payload", help="How partial sums travel, in fast classes: auto, full, fp16 or int8."),
]
TopologyOption = Annotated[str, typer.Option("--topology", help="How partial sums are exchanged: auto, mesh or star.")]
ContextOption = Annotated[
    int,
    typer.Option(
        "--context",
        help="Tokens that a session may hold. Default: the model's own, at most what fits.",
        show_default=False,
    ),
]
SessionsOption = Annotated[
    int,
    typer.Option(
        "--sessions",
        help="Sessions at the same time; they share the key-value memory. Default: 16.",
        show_default=False,
    ),
]
PrefixTokensOption = Annotated[
    int | None,
    typer.Option(
        "--prefix-tokens",
        help="Tokens of earlier prompts and answers kept ready for later ones; 0: none. Default: one session's context,"
        " at most 8192, and at most what fits.",
        show_default=False,
    ),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Use only devices with the label owner.")]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="Name of the model in the API. Default: the repository's in lower case (and :variant), or the folder's.",
        show_default=False,
    ),
]
ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api",
        envvar="GANGLION_API",
        help="Address of the API. Default: of the running `ganglion up`.",
        show_default=False,
        show_envvar=False,
    ),
]
