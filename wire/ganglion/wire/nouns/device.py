"""The device profile: what an agent advertises. Claims are priors; the probes inside it are figures."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from ganglion.wire.nouns.document import Document

BATCH_ROWS: Final = 16  # of the products that are timed for batches
PREFILL_ROWS: Final = 128  # and for prompts

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e16)]
DeviceName = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
Short = Annotated[str, msgspec.Meta(max_length=128)]


class FormatRate(Document, frozen=True, kw_only=True):
    """Measured rates of one weight format on this device, with `threads` of its profile.

    decode_bytes_per_s: bytes of weights streamed per second by a one-row product (GEMV).
    prefill_flop_per_s: floating-point operations per second of a PREFILL_ROWS-row product (GEMM).
    batch_bytes_per_s: bytes of weights streamed per second by a BATCH_ROWS-row product; 0 where it was not measured.
    """

    decode_bytes_per_s: Rate
    prefill_flop_per_s: Rate
    batch_bytes_per_s: Rate = 0.0


class DeviceProfile(Document, frozen=True, kw_only=True):
    """What one device is and measured. Sizes in bytes, rates per second."""

    host_id: Short  # equal for agents on one machine: they share its cores and memory
    hostname: Short
    system: Short  # for example "Linux-6.1 x86_64"
    kernel_family: Short  # ONNX Runtime version, provider, instruction set
    cores: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=4096)]  # intra-op threads the agent uses
    memory_bytes: Bytes  # of the machine
    memory_budget_bytes: Bytes  # what deployments here may use
    disk_free_bytes: Bytes
    disk_read_bytes_per_s: Rate
    memory_bytes_per_s: Rate  # float32 GEMV
    rates: dict[Short, FormatRate]  # by numeric class name: "fp32", "int4-32", "int4-128"
    providers: tuple[Short, ...]
    version: Short  # of the distribution
