"""OpenTelemetry: a span for each request, with its phases as children, sent to a collector over OTLP/HTTP.

Imported only where an address is set, for it needs the extra `otel`. Honours the caller's W3C trace
context. Tells names, numbers and times, never a text. Spans wait in a bounded queue for a thread that sends
them, so that a collector which is slow or gone costs spans and nothing else.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.caller import Caller, Course, Tally
from server.edge.access import is_public

logger = logging.getLogger("rivulet.tracing")

EXPORT_SECONDS = 3.0
"""That one batch may take, repetitions included."""
MAX_BATCH = 128
"""Spans: their encoding holds the interpreter for some milliseconds."""
END_SECONDS = 0.5
"""That the server's end waits for the last requests, and that it waits for their spans to be sent."""
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"}
CHATS = {"/v1/chat/completions", "/v1/messages", "/v1/responses"}
FINISHES = {"eos": "stop"}
"""Ours -> the conventions', where they differ."""
MOST_PATH = 200
"""Characters of a path that are told."""


class Traces:
    """Where spans are made and sent from; one a server."""

    def __init__(self, endpoint: str, model: str) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what matters is said below, once
        own = {"service.name": "rivulet", "service.version": version("rivulet")}
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes first.
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_SECONDS)
        told = _Told(exporter, endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(told, max_export_batch_size=MAX_BATCH))
        self._tracer = self._provider.get_tracer("rivulet", own["service.version"])
        self._context = TraceContextTextMapPropagator()
        self._model = model
        self._open = 0

    def begin(self, scope: Scope) -> Span:
        """The span of a request that came."""
        caller: Caller = scope["state"]["caller"]
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        given = {name: [v for n, v in fields if n == name] for name in ("traceparent", "tracestate")}
        # A header that comes twice is as invalid as one that cannot be read: the trace begins here.
        parent = self._context.extract(given) if len(given["traceparent"]) == 1 else None
        self._open += 1
        return self._tracer.start_span(
            _verb(scope),
            context=parent,
            kind=SpanKind.SERVER,
            start_time=_unix(caller.received, _epoch()),
            attributes={
                "http.request.method": scope["method"] if scope["method"] in METHODS else "_OTHER",
                "url.path": scope["path"][:MOST_PATH],
                "url.scheme": scope["scheme"],
                "network.protocol.version": scope["http_version"],
                "rivulet.request_id": caller.request_id,
            },
        )

    def end(self, span: Span, scope: Scope, status: int | None) -> None:
        """The request is over; `status` is None if nothing was answered."""
        self._open -= 1
        if span.is_recording():
            caller: Caller = scope["state"]["caller"]  # by now with the name of its key
            span.set_attribute("client.address", caller.client)
            self._describe_answer(span, scope, status)
            if caller.tally.course is not None:
                self._describe_generation(span, scope["path"], caller.tally, caller.tally.course)
        span.end()

    async def close(self) -> None:
        """Send what is there, as far as that is possible at once."""
        until = time.monotonic() + END_SECONDS
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.01)  # streams that were cut end within a few turns of the loop
        ending = threading.Thread(target=self._provider.shutdown, name="rivulet-traces", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, END_SECONDS)

    def _describe_answer(self, span: Span, scope: Scope, status: int | None) -> None:
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.update_name(f"{_verb(scope)} {route}")
            span.set_attribute("http.route", route)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                _mark_error(span, str(status))

    def _describe_generation(self, span: Span, path: str, tally: Tally, course: Course) -> None:
        """What was generated, and a child for each phase that it came to."""
        span.set_attributes(
            {
                "gen_ai.operation.name": "chat" if path in CHATS else "text_completion",
                "gen_ai.system": "rivulet",
                "gen_ai.provider.name": "rivulet",  # the newer name of the same
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": tally.prompt_tokens or 0,
                "gen_ai.usage.output_tokens": tally.output_tokens,
                "gen_ai.response.finish_reasons": [FINISHES.get(fate, fate) for fate in course.fates],
            }
        )
        epoch = _epoch()
        if course.error == "dropped":
            span.add_event("the client left", timestamp=_unix(course.ended, epoch))
        elif course.error is not None:
            _mark_error(span, course.error)
        marks = (course.submitted, course.started, course.first, course.ended)
        context = set_span_in_context(span)
        for name, begin, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            if begin is not None:
                child = self._tracer.start_span(name, context, start_time=_unix(begin, epoch))
                child.end(_unix(course.ended if end is None else end, epoch))


class Tracing:
    """ASGI middleware, inside of what makes the Caller: the span of each request but the supervisors'."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self.app = app
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and tell of it."""
        if scope["type"] != "http" or is_public(scope) or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
            return
        span = self.traces.begin(scope)
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.traces.end(span, scope, status)


class _Told(SpanExporter):
    """Says in the log when spans begin to be lost, and when they arrive again; not each time."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._well = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send some spans."""
        result = self._exporter.export(spans)
        well = result is SpanExportResult.SUCCESS
        if self._well and not well:
            logger.warning("the collector at %s does not take traces: they are lost", self._endpoint)
        elif well and not self._well:
            logger.info("the collector at %s takes traces again", self._endpoint)
        self._well = well
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._exporter.shutdown()


def _mark_error(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _verb(scope: Scope) -> str:
    """What a span's name begins with: never a word of the client's own."""
    return str(scope["method"]) if scope["method"] in METHODS else "HTTP"


def _epoch() -> int:
    """The zero of time.perf_counter, in nanoseconds of Unix time."""
    return time.time_ns() - time.perf_counter_ns()


def _unix(moment: float, epoch: int) -> int:
    """A moment of time.perf_counter in nanoseconds of Unix time."""
    return epoch + int(moment * 1e9)
