"""The probe's measurements, run in a process of their own: ONNX Runtime's thread pool is one for each process."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from ganglion.agent.probe.shapes import GRAPHS, SHAPES, Shape, Size
from ganglion.wire.nouns import BATCH_ROWS, PREFILL_ROWS, FormatRate

DECODE_S: Final = 0.35  # for all formats together
BATCH_S: Final = 0.35  # for all formats together
PREFILL_S: Final = 0.06  # for each format
DISK_BYTES: Final = 24 << 20
DISK_BLOCK_BYTES: Final = 1 << 20


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Figures that stay true while the machine and the software do."""

    rates: dict[str, FormatRate]
    memory_bytes_per_s: float
    disk_read_bytes_per_s: float
    providers: tuple[str, ...]


def measure(threads: int, size: Size, disk: Path) -> Measured:
    """Time every product of `size` with `threads` threads, and reading from `disk`. Call once in a process."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    ort.set_global_thread_pool_sizes(threads, 1)
    # Making them takes longer than timing them, and one thread makes one.
    with ThreadPoolExecutor(threads) as pool:
        made = pool.map(lambda shape: _Product(ort, shape, PREFILL_ROWS if shape.use == "prefill" else 1), _used(size))
        products = list(made)
    decode = {product.shape.name: product for product in products if product.shape.use == size}
    decoded = _streamed(decode, DECODE_S)
    for product in decode.values():
        product.bind(BATCH_ROWS)
    batched = _streamed(decode, BATCH_S)
    rates = {
        product.shape.name: FormatRate(
            decode_bytes_per_s=decoded[product.shape.name],
            prefill_flop_per_s=_prefill(product),
            batch_bytes_per_s=batched[product.shape.name],
        )
        for product in products
        if product.shape.use == "prefill"
    }
    return Measured(
        rates=rates,
        memory_bytes_per_s=decoded["fp32"],
        disk_read_bytes_per_s=disk_rate(disk),
        providers=tuple(ort.get_available_providers()),
    )


def _used(size: Size) -> list[Shape]:
    return [shape for shape in SHAPES if shape.use in (size, "prefill")]


class _Product:
    """A session with one product, bound to its buffers."""

    def __init__(self, ort: Any, shape: Shape, rows: int) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        values = [ort.OrtValue.ortvalue_from_numpy(_filled(kind, dims)) for kind, dims in shape.weights.values()]
        options.add_external_initializers(list(shape.weights), values)
        session = ort.InferenceSession((GRAPHS / shape.file).read_bytes(), options, providers=["CPUExecutionProvider"])
        self.shape = shape
        self._ort = ort
        self._session = session
        self._values = values
        self.bind(rows)

    def bind(self, rows: int) -> None:
        """Take so many rows from now on."""
        value = self._ort.OrtValue.ortvalue_from_numpy
        self.rows = rows
        self._input = np.full((rows, self.shape.inputs), 0.01, np.float32)
        self._output = np.empty((rows, self.shape.outputs), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("rows", value(self._input))
        self._binding.bind_ortvalue_output("product", value(self._output))

    def run_s(self) -> float:
        began_s = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - began_s


def _filled(kind: str, dims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Ordinary numbers: no zeros, which some kernels skip, and no denormals, which slow them down."""
    pattern = np.random.default_rng(0).integers(1, 255, 1 << 16, dtype=np.uint8)
    if kind == "float32":
        return np.resize((pattern.astype(np.float32) - 127.5) / 1024, dims)
    return np.resize(pattern.view(kind), dims)


def _streamed(products: dict[str, _Product], all_s: float) -> dict[str, float]:
    """Bytes of weights per second, by turns within `all_s`, so that each finds the cache full of the others'."""
    times: dict[str, list[float]] = {name: [] for name in products}
    for product in products.values():
        product.run_s()
    until_s = time.perf_counter() + all_s
    while time.perf_counter() < until_s or len(next(iter(times.values()))) < 3:
        for name, product in products.items():
            times[name].append(product.run_s())
    return {name: products[name].shape.weight_bytes / _typical(found) for name, found in times.items()}


def _prefill(product: _Product) -> float:
    """Floating-point operations per second of a product of many rows."""
    product.run_s()
    times: list[float] = []
    until_s = time.perf_counter() + PREFILL_S
    while time.perf_counter() < until_s or len(times) < 2:
        times.append(product.run_s())
    return product.rows * product.shape.flop / _typical(times)


def _typical(times: list[float]) -> float:
    """The lower quartile: what the machine does when nobody disturbs it, without a lucky single run."""
    return sorted(times)[len(times) // 4]


def disk_rate(folder: Path) -> float:
    """Bytes per second of reading a file that is not in the page cache; 0 when the disk has no room for it."""
    path = folder / f".probe-{secrets.token_hex(4)}"
    block = os.urandom(DISK_BLOCK_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return 0.0
    try:
        with contextlib.suppress(OSError):  # a full disk has no rate
            for _ in range(DISK_BYTES // DISK_BLOCK_BYTES):
                os.write(descriptor, block)
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            began_s = time.perf_counter()
            for at in range(0, DISK_BYTES, DISK_BLOCK_BYTES):
                os.pread(descriptor, DISK_BLOCK_BYTES, at)
            return DISK_BYTES / (time.perf_counter() - began_s)
        return 0.0
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
