"""What /metrics tells: Prometheus' text format, from a registry of the server's own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..decode.writer import Stats

_LONG = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
_SHORT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 3)


class Metrics:
    """The figures of one server. Safe from several threads."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self.requests = Counter(
            "mllama_requests", "Answered requests.", ("api", "route", "status"), registry=r
        )
        self.processing = Gauge("mllama_requests_processing", "Requests that are computed now.", registry=r)
        self.queued = Gauge("mllama_requests_queued", "Requests that wait.", registry=r)
        self.request_seconds = Histogram(
            "mllama_request_seconds", "From a request to its end.", ("route",), buckets=_LONG, registry=r
        )
        self.queue_seconds = Histogram("mllama_queue_seconds", "Waiting.", buckets=_LONG, registry=r)
        self.first_token = Histogram(
            "mllama_time_to_first_token_seconds",
            "From a request to its first text.",
            buckets=_LONG,
            registry=r,
        )
        self.token_seconds = Histogram(
            "mllama_time_per_token_seconds", "Mean of a reply.", buckets=_SHORT, registry=r
        )
        self.prompt_tokens = Counter("mllama_prompt_tokens", "Tokens of prompts.", registry=r)
        self.cached_tokens = Counter(
            "mllama_prompt_tokens_cached", "Tokens of prompts that were in the cache.", registry=r
        )
        self.generated_tokens = Counter("mllama_generated_tokens", "Tokens of replies.", registry=r)
        self.images = Counter(
            "mllama_images",
            "Images of prompts, by where their results came from: encoded, memory, disk.",
            ("source",),
            registry=r,
        )
        self.encode_seconds = Histogram(
            "mllama_image_encode_seconds",
            "To encode or find the images of a prompt.",
            buckets=_LONG,
            registry=r,
        )
        self.loaded = Gauge("mllama_model_loaded", "1 if the model is in memory.", ("model",), registry=r)
        self.loads = Counter("mllama_loads", "Models loaded.", registry=r)
        self.load_failures = Counter("mllama_load_failures", "Models that could not be loaded.", registry=r)
        self.cancelled = Counter("mllama_cancelled", "Requests that ended early.", ("reason",), registry=r)

    def count_reply(self, stats: Stats, sources: Sequence[str]) -> None:
        """A reply that has ended. sources: of the images of its prompt."""
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.cached_tokens.inc(stats.cached_tokens)
        self.generated_tokens.inc(stats.completion_tokens)
        for source in sources:
            self.images.labels(source).inc()
        if sources:
            self.encode_seconds.observe(stats.seconds["encode"])
        if stats.completion_tokens:
            self.token_seconds.observe(stats.seconds["decode"] / stats.completion_tokens)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)
