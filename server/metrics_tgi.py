"""TGI 3.3's metric names, with values that are measured here, for dashboards and autoscalers that know them.

A "batch" is a step of ours; its method is `prefill` if it computes prompt tokens, else `decode`.
A "request" is one call; what TGI takes of each candidate (input length, limit) is taken of each.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.records import EngineStats, StepRecord
from server.instruments import Counter, Histogram, Series, render_gauge

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
    guessed_tokens: int = 0
    """Those that took no step of their own."""

    @property
    def total(self) -> float:
        """From the call's arrival to its last token."""
        return self.validation + self.queue + self.inference

    @property
    def per_token(self) -> float:
        """Of the inference."""
        return self.inference / max(self.output_tokens, 1)


class TgiMetrics:
    """One a server. The engine's thread tells the steps, the event loop the rest; any thread may read."""

    def __init__(self, max_model_len: int, max_running: int) -> None:
        self._families: list[Counter | Histogram] = []
        self._stats: Callable[[], EngineStats] = EngineStats
        inputs = tuple((max_model_len - 1) / 100 * share for share in range(1, 101))
        totals = tuple(max_model_len / 100 * share for share in range(1, 101))
        self._requests = self._counter("request_count", "Calls of the routes that generate")
        self._successes = self._counter("request_success", "Calls that got their whole answer")
        self._failures = self._counter("request_failure", "Calls that did not", "err")
        self._steps = self._counter("batch_inference_count", "Steps of the model", "method")
        self._good_steps = self._counter("batch_inference_success", "Steps that did not fail", "method")
        self._bad_steps = self._counter("batch_inference_failure", "Steps that failed", "method")
        self._input = self._sizes("request_input_length", "Prompt tokens of a candidate", inputs)
        self._limit = self._sizes("request_max_new_tokens", "Most output tokens of a candidate", totals)
        self._generated = self._sizes("request_generated_tokens", "Output tokens of a call", totals)
        self._skipped = self._sizes(
            "request_skipped_tokens", "Output tokens of a call that were speculated", range(11)
        )
        self._total = self._duration("request", "From a call's arrival to its last token")
        self._validation = self._duration("request_validation", "From a call's arrival to the queue")
        self._queue = self._duration("request_queue", "From the queue to the first step that computes a call")
        self._inference = self._duration("request_inference", "From that step to the last token")
        self._per_token = self._duration("request_mean_time_per_token", "Inference time per output token")
        self._whole_step = self._by_method("batch_inference", "A step, bookkeeping included")
        self._forward = self._by_method("batch_forward", "A step's forward pass and sampling")
        self._text = self._by_method("batch_decode", "Turning a step's tokens into text")
        self._filter = self._by_method("batch_filter", "Taking in a step's tokens, out the finished")
        self._next_size = self._sizes(
            "batch_next_size", "Sequences whose prompts a step computes", range(1, max_running + 1)
        )
        self._lock = threading.Lock()  # of the next two: both the engine and a reader observe the text's time
        self._text_method: str | None = None
        self._text_observed = 0.0
        self._text_seconds = 0.0

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's state whenever the metrics are read."""
        self._stats = stats

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
        self._skipped.observe(timings.guessed_tokens)

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
        self._whole_step[method].observe(record.whole_seconds)
        self._forward[method].observe(record.seconds)
        self._filter[method].observe(record.update_seconds)
        if record.prefills:
            self._next_size.observe(record.prefills)
        with self._lock:
            self._observe_text()
            self._text_method = method

    def add_text_seconds(self, seconds: float) -> None:
        """A token of the last step was turned into text, on the event loop."""
        self._text_seconds += seconds

    def render(self) -> str:
        """The text exposition format."""
        with self._lock:
            self._observe_text()
        stats = self._stats()
        gauges = (
            ("batch_current_size", "Sequences that run", stats.running),
            (
                "batch_current_max_tokens",
                "Tokens that they may come to, prompts and outputs",
                stats.promised_tokens,
            ),
            ("queue_size", "Sequences that wait for a place", stats.waiting),
        )
        lines = [render_gauge(f"tgi_{name}", text, value) for name, text, value in gauges]
        return "".join([*lines, *(family.render() for family in self._families)])

    def _observe_text(self) -> None:
        """What the last step's tokens have cost so far; late ones count for the next step."""
        if self._text_method is not None:
            seconds = self._text_seconds
            self._text[self._text_method].observe(seconds - self._text_observed)
            self._text_observed, self._text_method = seconds, None

    def _counter(self, name: str, text: str, label: str = "") -> Counter:
        values = METHODS if label == "method" else ()
        counter = Counter(f"tgi_{name}", text, label, values)
        self._families.append(counter)
        return counter

    def _histogram(self, name: str, text: str, bounds: Iterable[float], label: str = "") -> Histogram:
        histogram = Histogram(f"tgi_{name}", text, bounds, label)
        self._families.append(histogram)
        return histogram

    def _sizes(self, name: str, text: str, bounds: Iterable[float]) -> Series:
        return self._histogram(name, text, bounds).series()

    def _duration(self, name: str, text: str) -> Series:
        return self._sizes(f"{name}_duration", f"{text}, in seconds", SECONDS)

    def _by_method(self, name: str, text: str) -> dict[str, Series]:
        histogram = self._histogram(f"{name}_duration", f"{text}, in seconds", SECONDS, "method")
        return {method: histogram.series(method) for method in METHODS}
