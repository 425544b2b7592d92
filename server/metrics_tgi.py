"""TGI 3.3's metric names, with values that are measured here, for dashboards and autoscalers that know them.

A "batch" is a step of ours; its method is `prefill` if it computes prompt tokens, else `decode`.
A "request" is one call; what TGI takes of each candidate (input length, limit) is taken of each.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from server.engine.engine import EngineStats, StepRecord

SECONDS = tuple(0.0001 * 1.5**power for power in range(1, 36))
"""TGI's buckets of every duration."""
METHODS = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a call's time went, in seconds."""

    validation: float
    queue: float
    inference: float
    output_tokens: int

    @property
    def total(self) -> float:
        """From the call's arrival to its last token."""
        return self.validation + self.queue + self.inference

    @property
    def per_token(self) -> float:
        """Of the inference."""
        return self.inference / max(self.output_tokens, 1)


class TgiMetrics:
    """One object a server; its methods are cheap and may be called from any thread."""

    def __init__(self, max_model_len: int, max_running: int) -> None:
        self.registry = CollectorRegistry()
        inputs = tuple((max_model_len - 1) / 100 * share for share in range(1, 101))
        totals = tuple(max_model_len / 100 * share for share in range(1, 101))
        self._requests = PlainCounter("tgi_request_count", "Calls of the routes that generate")
        self._successes = PlainCounter("tgi_request_success", "Calls that got their whole answer")
        self._failures = PlainCounter("tgi_request_failure", "Calls that did not", "err")
        self._steps = PlainCounter("tgi_batch_inference_count", "Steps of the model", "method", METHODS)
        self._good_steps = PlainCounter(
            "tgi_batch_inference_success", "Steps that did not fail", "method", METHODS
        )
        self._bad_steps = PlainCounter("tgi_batch_inference_failure", "Steps that failed", "method", METHODS)
        self._input = self._histogram("request_input_length", "Prompt tokens of a candidate", inputs)
        self._limit = self._histogram("request_max_new_tokens", "Most output tokens of a candidate", totals)
        self._generated = self._histogram("request_generated_tokens", "Output tokens of a call", totals)
        self._skipped = self._histogram(
            "request_skipped_tokens", "Output tokens of a call that were speculated", range(11)
        )
        self._total = self._duration("request", "From a call's arrival to its last token")
        self._validation = self._duration("request_validation", "From a call's arrival to the queue")
        self._queue = self._duration("request_queue", "From the queue to the first step that computes a call")
        self._inference = self._duration("request_inference", "From that step to the last token")
        self._per_token = self._duration("request_mean_time_per_token", "Inference time per output token")
        self._whole_step = self._duration("batch_inference", "A step, bookkeeping included", METHODS)
        self._forward = self._duration("batch_forward", "A step's forward pass and sampling", METHODS)
        self._text = self._duration("batch_decode", "Turning a step's tokens into text", METHODS)
        self._filter = self._duration("batch_filter", "Taking in a step's tokens, out the finished", METHODS)
        self._next_size = self._histogram(
            "batch_next_size", "Sequences whose prompts a step computes", range(1, max_running + 1)
        )
        self._lock = threading.Lock()
        self._text_seconds = 0.0
        self._text_method: str | None = None

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's state whenever the metrics are read."""
        for name, text, read in (
            ("batch_current_size", "Sequences that run", lambda: stats().running),
            (
                "batch_current_max_tokens",
                "Tokens that they may come to, prompts and outputs",
                lambda: stats().promised_tokens,
            ),
            ("queue_size", "Sequences that wait for a place", lambda: stats().waiting),
        ):
            Gauge(f"tgi_{name}", text, registry=self.registry).set_function(read)

    def count_request(self) -> None:
        """A call came."""
        self._requests.count()

    def count_failure(self, error: str) -> None:
        """A call was refused, failed or was given up by its client."""
        self._failures.count(error)

    def count_success(self, timings: Timings) -> None:
        """A call got its last token."""
        self._successes.count()
        self._total.observe(timings.total)
        self._validation.observe(timings.validation)
        self._queue.observe(timings.queue)
        self._inference.observe(timings.inference)
        self._per_token.observe(timings.per_token)
        self._generated.observe(timings.output_tokens)
        self._skipped.observe(0)  # no token is speculated

    def start_candidate(self, prompt_tokens: int, max_tokens: int) -> None:
        """A sequence was admitted."""
        self._input.observe(prompt_tokens)
        self._limit.observe(max_tokens)

    def record_step(self, record: StepRecord) -> None:
        """The engine finished a step."""
        method = "prefill" if record.prefills else "decode"
        self._steps.count(method)
        if record.failed:
            self._bad_steps.count(method)
            return
        self._good_steps.count(method)
        self._whole_step.labels(method).observe(record.whole_seconds)
        self._forward.labels(method).observe(record.seconds)
        self._filter.labels(method).observe(record.update_seconds)
        if record.prefills:
            self._next_size.observe(record.prefills)
        with self._lock:
            self._observe_text()
            self._text_method = method

    def add_text_seconds(self, seconds: float) -> None:
        """A token of the last step was turned into text, on the event loop."""
        with self._lock:
            self._text_seconds += seconds

    def render(self) -> bytes:
        """The text exposition format."""
        with self._lock:
            self._observe_text()
        counters = (
            *(self._requests, self._successes, self._failures),
            *(self._steps, self._good_steps, self._bad_steps),
        )
        return generate_latest(self.registry) + "".join(c.render() for c in counters).encode()

    def _observe_text(self) -> None:
        """What the last step's tokens have cost so far; late ones count for the next step."""
        if self._text_method is not None:
            self._text.labels(self._text_method).observe(self._text_seconds)
            self._text_seconds, self._text_method = 0.0, None

    def _duration(self, name: str, text: str, methods: tuple[str, ...] = ()) -> Histogram:
        histogram = Histogram(
            f"tgi_{name}_duration",
            f"{text}, in seconds",
            ["method"] if methods else [],
            buckets=SECONDS,
            registry=self.registry,
        )
        for method in methods:
            histogram.labels(method)  # there from the start, at zero
        return histogram

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] | range) -> Histogram:
        return Histogram(f"tgi_{name}", text, buckets=tuple(buckets), registry=self.registry)


class PlainCounter:
    """A counter under exactly its name: prometheus_client would add `_total`, which TGI's do not have."""

    def __init__(self, name: str, text: str, label: str | None = None, values: tuple[str, ...] = ()) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._lock = threading.Lock()
        self._counts: dict[str | None, int] = dict.fromkeys(values, 0) if label else {None: 0}

    def count(self, value: str | None = None) -> None:
        """One more; `value` is the label's."""
        with self._lock:
            self._counts[value] = self._counts.get(value, 0) + 1

    def render(self) -> str:
        """Its lines of the text exposition format."""
        with self._lock:
            counts = list(self._counts.items())
        lines = [f"# HELP {self._name} {self._text}", f"# TYPE {self._name} counter"]
        for value, count in counts:
            label = "" if self._label is None else f'{{{self._label}="{value}"}}'
            lines.append(f"{self._name}{label} {float(count)}")
        return "\n".join(lines) + "\n"
