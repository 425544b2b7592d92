"""What the server counts, under our names and under TGI's; docs/metrics.md says what each metric tells.

The values of the labels are declared here, once: none comes from what a client sends.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from server.engine.engine import Engine
from server.engine.records import StepRecord
from server.engine.submission import Submission
from server.errors import Kind, Rejection
from server.instruments import Counter, Histogram, Series
from server.metrics_tgi import TgiMetrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10),
)
"""A step takes about a millisecond for a small model, and a few hundred for a long prompt on a CPU."""
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

Fate = Literal["eos", "length", "stop", "aborted", "error"]
"""How an admitted request ends; an aborted one was given up by its client."""
Fault = Literal["failed_step", "out_of_memory"]
"""A step that raised, whoever survived it; a request that was given up because memory was short."""


Proposer = Literal["prompt-lookup", "draft-model"]
"""What guesses ahead."""


class Metrics:
    """One a server. The engine's thread tells the steps, the event loop the rest; any thread may read."""

    def __init__(self, max_model_len: int, max_running: int, about: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self.tgi = TgiMetrics(max_model_len, max_running)
        self._about = dict(about)
        self._engine: Engine | None = None
        self._connections: Callable[[], int] | None = None
        self._requests = self._counter("requests", "Requests by fate", "fate", get_args(Fate))
        self._rejections = self._counter(
            "rejections", "Requests refused before the first byte", "reason", get_args(Rejection)
        )
        self._faults = self._counter("faults", "What went wrong in the engine", "kind", get_args(Fault))
        self._proposed = self._counter(
            "speculative_proposed_tokens", "Tokens guessed ahead and computed", "proposer", get_args(Proposer)
        )
        self._accepted = self._counter(
            "speculative_accepted_tokens", "Guessed tokens that came true", "proposer", get_args(Proposer)
        )
        self._prompt_tokens = self._histogram("prompt_tokens", "Prompt tokens a request", _TOKENS)
        self._output_tokens = self._histogram("output_tokens", "Output tokens a request", _TOKENS)
        self._duration = self._histogram("request_seconds", "Time from admission to the last token", _SECONDS)
        self._queue = self._histogram(
            "queue_seconds", "Time from a request's admission to its first step", _SECONDS
        )
        self._prefill = self._histogram(
            "prefill_seconds", "Time from a request's first step to its first token", _SECONDS
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "Time from admission to a request's first token", _SECONDS
        )
        self._gap = self._histogram(
            "inter_token_seconds", "Time between two tokens of a request", _STEP_SECONDS
        )
        self._step = self._histogram("step_seconds", "Time of a step of the model", _STEP_SECONDS)
        self._step_rows = self._histogram("step_rows", "Rows a step computes", _TOKENS)
        self._step_sequences = self._histogram("step_sequences", "Sequences a step computes", _TOKENS)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Read the engine's state whenever the metrics are read."""
        self._engine = engine
        self.tgi.watch(lambda: engine.stats)

    def watch_connections(self, count: Callable[[], int]) -> None:
        """The same for the number of open connections."""
        self._connections = count

    def count_rejection(self, kind: Kind) -> None:
        """A request was refused with an error of this kind; whoever refuses it says so, once."""
        if kind.rejection is not None:
            self._rejections.count(kind.rejection)

    def record_step(self, record: StepRecord) -> None:
        """The engine finished a step."""
        self.tgi.record_step(record)
        for _ in range(record.shed):
            self._faults.count("out_of_memory")
        if record.proposed:
            self._proposed.count(record.proposer, record.proposed)
            self._accepted.count(record.proposer, record.accepted)
        if record.failed:
            self._faults.count("failed_step")
            return
        self._step.observe(record.seconds)
        self._step_rows.observe(record.rows)
        self._step_sequences.observe(record.sequences)

    def start_request(self, prompt_tokens: int, max_tokens: int, submission: Submission) -> "RequestClock":
        """A request was admitted, in this submission."""
        self._prompt_tokens.observe(prompt_tokens)
        self.tgi.start_candidate(prompt_tokens, max_tokens)
        return RequestClock(self, submission)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry) + self.tgi.render().encode()

    def collect(self) -> Iterator[Metric]:
        """What is read rather than counted, from one picture of the engine; for the registry."""
        yield InfoMetricFamily("rivulet", "What serves", self._about)
        made = self._first.count + self._gap.count
        yield CounterMetricFamily("rivulet_generated_tokens", "Output tokens, counted as they are made", made)
        if self._connections is not None:
            yield GaugeMetricFamily("rivulet_connections", "Open connections", self._connections())
        if self._engine is None:
            return
        engine, stats = self._engine, self._engine.stats
        gauges = {
            "requests_running": ("Requests that hold cache blocks", stats.running),
            "requests_waiting": ("Requests that wait for a place", stats.waiting),
            "waiting_prompt_tokens": (
                "Prompt tokens that no step has computed yet",
                engine.admission.waiting_tokens,
            ),
            "oldest_waiting_seconds": ("Age of the oldest request that waits", engine.longest_wait),
            "cache_blocks_used": ("Cache blocks in use", stats.blocks_used),
            "cache_blocks_total": ("Cache blocks in all", stats.blocks_total),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"rivulet_{name}", text, value)
        counters = {
            "preemptions": ("Requests that lost their blocks to older ones", stats.scheduler.preemptions),
            "prefix_cache_prompt_tokens": (
                "Prompt tokens computed or reused",
                stats.scheduler.prompt_tokens,
            ),
            "prefix_cache_hit_tokens": ("Prompt tokens reused", stats.scheduler.cached_tokens),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"rivulet_{name}", text, value)

    def _counter(self, name: str, text: str, label: str, values: tuple[str, ...]) -> Counter:
        counter = Counter(f"rivulet_{name}", text, label, values)
        self.registry.register(counter)
        return counter

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Series:
        histogram = Histogram(f"rivulet_{name}", text, bounds)
        self.registry.register(histogram)
        return histogram.series()


class RequestClock:
    """Times one request for its metrics."""

    def __init__(self, metrics: Metrics, submission: Submission) -> None:
        self._metrics = metrics
        self._submission = submission
        self._last = submission.submitted
        self._tokens = 0
        self.first: float | None = None
        """When the first token came."""
        self.fate: Fate | None = None
        """How the request ended."""

    def count_token(self, came: float) -> None:
        """A token that came at `came`, by time.perf_counter, was turned into text."""
        metrics = self._metrics
        metrics.tgi.add_text_seconds(time.perf_counter() - came)
        if self._tokens:
            metrics._gap.observe(came - self._last)
        else:
            self._observe_start(came)
        self._last = came
        self._tokens += 1

    def finish(self, fate: Fate) -> None:
        """The request ended; only the first call counts."""
        if self.fate is not None:
            return
        self.fate = fate
        self._metrics._requests.count(fate)
        self._metrics._output_tokens.observe(self._tokens)
        self._metrics._duration.observe(time.perf_counter() - self._submission.submitted)

    def _observe_start(self, came: float) -> None:
        """The first token, and what came before it."""
        self.first = came
        submitted = self._submission.submitted
        started = self._submission.started or came
        self._metrics._first.observe(came - submitted)
        self._metrics._queue.observe(started - submitted)
        self._metrics._prefill.observe(came - started)
