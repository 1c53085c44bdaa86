"""What `/metrics` shows, in Prometheus' text format. No label holds anything that a client wrote."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ganglion.wire import limits
from ganglion.wire.hello import distribution_version

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ganglion_gateway_requests", "HTTP requests answered", ("route", "code"), registry=self._registry
        )
        self._prompt = Counter("ganglion_gateway_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._cached = Counter(
            "ganglion_gateway_cached_prompt_tokens",
            "Tokens of prompts that were not run again: kept of earlier sessions",
            registry=self._registry,
        )
        self._completion = Counter("ganglion_gateway_completion_tokens", "Tokens drawn", registry=self._registry)
        self._ttft = Histogram(
            "ganglion_gateway_ttft_seconds",
            "Time to first token, from the arrival of the request",
            buckets=_TTFT_S,
            registry=self._registry,
        )
        self._tpot = Histogram(
            "ganglion_gateway_tpot_seconds",
            "Time per output token after the first, mean of a session",
            buckets=_TPOT_S,
            registry=self._registry,
        )
        self.sessions = Gauge("ganglion_gateway_sessions", "Sessions open now", registry=self._registry)
        self._cancelled = Counter(
            "ganglion_gateway_sessions_cancelled", "Sessions ended early", ("reason",), registry=self._registry
        )
        bounds = {name.lower(): str(value) for name, value in vars(limits).items() if name.isupper()}
        Info("ganglion_gateway_limits", "Hard limits", registry=self._registry).info(bounds)
        Info("ganglion_gateway_build", "This release", registry=self._registry).info(
            {"version": distribution_version()}
        )

    def answered(self, route: str, code: int) -> None:
        """A request to `route` (a template, never a path) was answered with `code`."""
        self._requests.labels(route, str(code)).inc()

    def first_token(self, ttft_s: float) -> None:
        """The first token of a session came `ttft_s` after its request."""
        self._ttft.observe(ttft_s)

    def finished(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int, tpot_s: float | None) -> None:
        """A session ended; `tpot_s` is None with less than two tokens."""
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        self._completion.inc(completion_tokens)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)

    def cancelled(self, reason: str) -> None:
        """A session ended early: "left" (the client left, or reads too slowly), "stop_string", or an error's code."""
        self._cancelled.labels(reason).inc()

    def text(self) -> bytes:
        """Everything, for a scraper."""
        return generate_latest(self._registry)
