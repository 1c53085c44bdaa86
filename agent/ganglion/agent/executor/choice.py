"""Which executor a worker runs its shard with: `--executor ort` or `torch[:cpu|:cuda][:bf16|:fp16|:fp32]`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast, get_args

from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.nouns import Manifest, Plan, Share, Stage
from ganglion.wire.shares import OpenPiece

if TYPE_CHECKING:  # a supervisor reads the choice and loads no ONNX Runtime
    from ganglion.agent.executor.port import StepExecutor

Device = Literal["", "cpu", "cuda"]
Dtype = Literal["", "bf16", "fp16", "fp32"]
ORT: Final = "ort"


@dataclass(frozen=True, slots=True)
class ExecutorChoice:
    """kind: "ort" (ONNX Runtime) or "torch". device: "": an accelerator if there is one. dtype: "": by the device."""

    kind: Literal["ort", "torch"] = "ort"
    device: Device = ""
    dtype: Dtype = ""

    @property
    def text(self) -> str:
        """As it is written."""
        return ":".join(part for part in (self.kind, self.device, self.dtype) if part)


def parse_executor(text: str) -> ExecutorChoice:
    """The choice of this text; raises InvalidRequest naming what may be said."""
    kind, *rest = text.split(":")
    device: str = rest.pop(0) if rest and rest[0] in get_args(Device) and rest[0] else ""
    dtype: str = rest.pop(0) if rest and rest[0] in get_args(Dtype) and rest[0] else ""
    if rest or kind not in (ORT, "torch") or (kind == ORT and (device or dtype)):
        raise InvalidRequest(
            f"--executor {text!r}: ort, or torch[:cpu|:cuda][:bf16|:fp16|:fp32], for example torch:cuda:bf16",
            param="executor",
        )
    return ExecutorChoice(cast(Literal["ort", "torch"], kind), cast(Device, device), cast(Dtype, dtype))


def kernels_of(choice: ExecutorChoice) -> str:
    """Whose kernels compute, for a device's profile; "" where the probe says it. Raises Unsupported without torch."""
    if choice.kind == ORT:
        return ""
    return f"torch {_torch_version(choice)} {choice.device or 'any'} {choice.dtype or 'by device'}"


def _torch_version(choice: ExecutorChoice) -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(
            f"--executor {choice.text}: torch is not installed here; install ganglion-ai[torch], or use --executor ort",
            param="executor",
        ) from None


def load_torch(
    manifest: Manifest,
    plan: Plan,
    stage: Stage,
    share: Share,
    choice: ExecutorChoice,
    *,
    open_piece: OpenPiece,
    progress: Callable[[int, int], None],
) -> StepExecutor:
    """A share loaded by torch; raises Unsupported where torch or the device is missing or experts are to be on disk."""
    _torch_version(choice)
    if share.expert_cache_bytes:
        raise Unsupported(
            f"--executor {choice.text}: torch holds every expert in memory; use --executor ort, or no --expert-memory",
            param="executor",
        )
    from ganglion.agent.torch_executor.executor import TorchExecutor
    from ganglion.agent.torch_executor.loader import load_torch_shard, settle

    settings = settle(choice, plan.threads.get(share.device, 1))
    shard = load_torch_shard(manifest, plan, stage, share, settings, open_piece=open_piece, progress=progress)
    return TorchExecutor(manifest, plan, shard, settings, open_piece)
