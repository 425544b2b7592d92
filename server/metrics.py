"""What the server counts, as Prometheus metrics in registries of its own: ours, and under TGI's names."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine.engine import EngineStats, StepRecord
from server.metrics_tgi import TgiMetrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """One object a server; its methods are cheap and may be called from any thread."""

    def __init__(self, max_model_len: int, max_running: int) -> None:
        self.registry = CollectorRegistry()
        self.tgi = TgiMetrics(max_model_len, max_running)
        self._requests = self._counter("requests", "Requests by fate", ["fate"])
        self._rejections = self._counter("rejections", "Requests refused before the first byte", ["reason"])
        self._prompt_tokens = self._histogram("prompt_tokens", "Prompt tokens a request", _TOKENS)
        self._output_tokens = self._histogram("output_tokens", "Output tokens a request", _TOKENS)
        self._generated = self._counter("generated_tokens", "Output tokens, counted as they are made")
        self._duration = self._histogram("request_seconds", "Time from admission to the last token", _SECONDS)
        self._first = self._histogram(
            "time_to_first_token_seconds", "Time to a request's first token", _SECONDS
        )
        self._gap = self._histogram("inter_token_seconds", "Time between two tokens of a request", _SECONDS)
        self._step = self._histogram("step_seconds", "Time of a step of the model", _SECONDS)
        self._step_rows = self._histogram("step_rows", "Rows a step computes", _TOKENS)
        self._step_sequences = self._histogram("step_sequences", "Sequences a step computes", _TOKENS)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's state whenever the metrics are read."""
        self.tgi.watch(stats)
        gauges: dict[str, tuple[str, Callable[[EngineStats], int]]] = {
            "requests_running": ("Requests that hold cache blocks", lambda s: s.running),
            "requests_waiting": ("Requests that wait for a place", lambda s: s.waiting),
            "cache_blocks_used": ("Cache blocks in use", lambda s: s.blocks_used),
            "cache_blocks_total": ("Cache blocks in all", lambda s: s.blocks_total),
            "preemptions_total": (
                "Requests that lost their blocks to older ones",
                lambda s: s.scheduler.preemptions,
            ),
            "prefix_cache_prompt_tokens_total": (
                "Prompt tokens computed or reused",
                lambda s: s.scheduler.prompt_tokens,
            ),
            "prefix_cache_hit_tokens_total": ("Prompt tokens reused", lambda s: s.scheduler.cached_tokens),
        }
        for name, (text, read) in gauges.items():
            gauge = Gauge(f"rivulet_{name}", text, registry=self.registry)
            gauge.set_function(lambda read=read: read(stats()))  # type: ignore[misc]

    def count_rejection(self, reason: str) -> None:
        """A request was not admitted."""
        self._rejections.labels(reason).inc()

    def record_step(self, record: StepRecord) -> None:
        """The engine finished a step."""
        self.tgi.record_step(record)
        if record.failed:
            return
        self._step.observe(record.seconds)
        self._step_rows.observe(record.rows)
        self._step_sequences.observe(record.sequences)

    def start_request(self, prompt_tokens: int, max_tokens: int) -> "RequestClock":
        """A request was admitted."""
        self._prompt_tokens.observe(prompt_tokens)
        self.tgi.start_candidate(prompt_tokens, max_tokens)
        return RequestClock(self)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry) + self.tgi.render()

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"rivulet_{name}", text, labels or [], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"rivulet_{name}", text, buckets=buckets, registry=self.registry)


class RequestClock:
    """Times one request for its metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = self._last = time.perf_counter()
        self._tokens = 0
        self._finished = False

    def count_token(self) -> None:
        """A token reached the text side."""
        now = time.perf_counter()
        histogram = self._metrics._gap if self._tokens else self._metrics._first
        histogram.observe(now - self._last)
        self._metrics._generated.inc()
        self._last = now
        self._tokens += 1

    def finish(self, fate: str) -> None:
        """The request ended; only the first call counts."""
        if self._finished:
            return
        self._finished = True
        self._metrics._requests.labels(fate).inc()
        self._metrics._output_tokens.observe(self._tokens)
        self._metrics._duration.observe(time.perf_counter() - self._started)
