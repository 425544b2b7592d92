"""Traces as a collector gets them: a real OTLP/HTTP receiver beside a live server."""

import asyncio
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.types import Receive, Scope, Send
from wire import FORMS, RawCall, wait_for

from server.caller import Caller
from server.config import InvalidSettings, ServeSettings, parse_settings
from server.edge.tracing import Traces, Tracing

ROOT = Path(__file__).resolve().parents[1]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ["queue", "prefill", "decode"]


class Collector:
    """Takes traces over OTLP/HTTP and keeps their spans; `status` is what it answers."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.raw = b""
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces" and collector.status == 200:
                    collector.take(body)
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(plain(resource.resource.attributes))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def servers(self, **attributes: object) -> list[Span]:
        """The requests' spans that have these attributes."""
        wanted = {name.replace("__", "."): value for name, value in attributes.items()}
        return [
            span
            for span in self.spans
            if span.kind == Span.SPAN_KIND_SERVER and wanted.items() <= plain(span.attributes).items()
        ]

    def children(self, parent: Span) -> list[Span]:
        return [span for span in self.spans if span.parent_span_id == parent.span_id]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {item.key: value_of(item.value) for item in attributes}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def traced(tiny_folder: Path, collector: Collector) -> Iterator[LiveServer]:
    """A server whose spans arrive soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        server = LiveServer(tiny_folder, dtype="float32", max_running=1, otlp_endpoint=collector.url)
    yield server
    server.stop()


def ask(server: LiveServer, collector: Collector, form: int, **headers: str) -> tuple[Span, httpx.Response]:
    """A call that makes 5 tokens of 6, and its span."""
    with server.client(headers=headers) as client:
        answer = client.post(FORMS[form].path, json=FORMS[form].body("SECRET", 5))
    return span_of(collector, answer), answer


def span_of(collector: Collector, answer: httpx.Response) -> Span:
    name = answer.headers["x-request-id"]
    wait_for(lambda: len(collector.servers(rivulet__request_id=name)) == 1)
    return collector.servers(rivulet__request_id=name)[0]


@pytest.mark.parametrize("form", range(8), ids=lambda index: str(FORMS[index]))
def test_a_request_is_a_span_with_its_phases(traced: LiveServer, collector: Collector, form: int) -> None:
    began = time.time_ns()
    span, answer = ask(traced, collector, form)
    ended = time.time_ns()
    assert answer.status_code == 200
    assert span.name == f"POST {FORMS[form].path}"
    told = plain(span.attributes)
    del told["rivulet.request_id"], told["network.protocol.version"]
    prompt = told.pop("gen_ai.usage.input_tokens")
    assert prompt == 6 or (FORMS[form].path.endswith("/chat/completions") and prompt > 6)
    assert told == {
        "http.request.method": "POST",
        "http.route": FORMS[form].path,
        "http.response.status_code": 200,
        "url.path": FORMS[form].path,
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "gen_ai.system": "rivulet",
        "gen_ai.provider.name": "rivulet",
        "gen_ai.operation.name": "chat" if "chat" in FORMS[form].path else "text_completion",
        "gen_ai.request.model": traced.name,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert span.parent_span_id == b""
    assert span.status.code == Status.STATUS_CODE_UNSET
    phases = collector.children(span)
    assert [phase.name for phase in phases] == PHASES
    assert all(phase.trace_id == span.trace_id for phase in phases)
    # One after the other without a gap, within the request, within the time that the client saw.
    edges = [phases[0].start_time_unix_nano, *(phase.end_time_unix_nano for phase in phases)]
    assert [phase.start_time_unix_nano for phase in phases] == edges[:-1]
    marks = [began, span.start_time_unix_nano, *edges, span.end_time_unix_nano, ended]
    slack = 2_000_000  # two clocks are read, one after the other
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(marks))


def test_the_resource_names_the_service(traced: LiveServer, collector: Collector) -> None:
    ask(traced, collector, 0)
    assert collector.resources[-1]["service.name"] == "rivulet"
    assert collector.resources[-1]["service.version"]


@pytest.mark.parametrize(
    ("traceparent", "parent"),
    [
        (f"00-{TRACE}-{PARENT}-01", PARENT),
        (f"01-{TRACE}-{PARENT}-01-more", PARENT),  # a later version
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}", ""),
        (f"00-{TRACE}-{PARENT}-01-more", ""),
        ("x" * 5000, ""),
        ("\xff\x80", ""),
        ("", ""),
    ],
)
def test_the_callers_trace_goes_on(
    traced: LiveServer, collector: Collector, traceparent: str, parent: str
) -> None:
    headers: Any = {"traceparent": traceparent.encode("latin-1"), "tracestate": "a=b"}
    span, answer = ask(traced, collector, 0, **headers)
    assert answer.status_code == 200
    assert span.parent_span_id.hex() == parent
    assert (span.trace_id.hex() == TRACE) == bool(parent)
    assert span.trace_state == ("a=b" if parent else "")
    assert {phase.trace_id for phase in collector.children(span)} == {span.trace_id}


def test_two_parents_are_none(traced: LiveServer, collector: Collector) -> None:
    parent = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    with traced.client(headers=[parent, parent]) as client:
        answer = client.post("/generate", json=FORMS[0].body("SECRET", 1))
    assert span_of(collector, answer).parent_span_id == b""


def test_what_the_caller_does_not_sample_is_not_told(traced: LiveServer, collector: Collector) -> None:
    with traced.client(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}) as client:
        silent = client.post("/generate", json=FORMS[0].body("SECRET", 1))
    assert silent.status_code == 200
    ask(traced, collector, 0)  # whose span comes after
    assert not collector.servers(rivulet__request_id=silent.headers["x-request-id"])


def test_who_supervises_is_not_told(traced: LiveServer, collector: Collector) -> None:
    with traced.client() as client:
        for path in ("/", "/health", "/ping", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
    ask(traced, collector, 0)
    paths = {plain(span.attributes)["url.path"] for span in collector.servers()}
    assert "/generate" in paths
    assert not paths & {"/health", "/ping", "/ready", "/metrics"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "name"),
    [
        ("POST", "/generate", {"inputs": ""}, 422, "POST /generate"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "POST /v1/chat/completions"),
        ("GET", "/secret/path", None, 404, "GET"),
        ("BREW", "/generate", None, 405, "HTTP /generate"),
        ("GET", "/info", None, 200, "GET /info"),
    ],
)
def test_a_refusal_is_a_span_without_phases(
    traced: LiveServer,
    collector: Collector,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    status: int,
    name: str,
) -> None:
    with traced.client() as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == status
    span = span_of(collector, answer)
    told = plain(span.attributes)
    assert span.name == name
    assert told["http.response.status_code"] == status
    assert told["http.request.method"] == ("_OTHER" if method == "BREW" else method)
    assert span.status.code == Status.STATUS_CODE_UNSET  # theirs is not our error
    assert "gen_ai.system" not in told
    assert collector.children(span) == []


def test_a_stream_that_is_left_ends_its_span(traced: LiveServer, collector: Collector) -> None:
    with RawCall(traced, FORMS[1], FORMS[1].body("SECRET", 500)) as left:
        left.read_events(3)
        with RawCall(traced, FORMS[0], FORMS[0].body("SECRET", 500)) as queued:
            wait_for(lambda: traced.stats.waiting == 1)
            queued.leave()
            left.leave()
    traced.wait_until_idle()
    wanted = {"gen_ai.response.finish_reasons": ["aborted"]}
    wait_for(lambda: len(collector.servers(**wanted)) == 2)
    by_path = {plain(span.attributes)["url.path"]: span for span in collector.servers(**wanted)}
    first, second = by_path["/generate_stream"], by_path["/generate"]
    for span, phases in ((first, PHASES), (second, PHASES[:1])):
        assert [event.name for event in span.events] == ["the client left"]
        assert [phase.name for phase in collector.children(span)] == phases
        assert span.status.code == Status.STATUS_CODE_UNSET
    assert 3 <= plain(first.attributes)["gen_ai.usage.output_tokens"] < 500
    assert plain(second.attributes)["http.response.status_code"] == 499
    assert ask(traced, collector, 1)[1].status_code == 200


def test_a_failure_is_an_error(
    traced: LiveServer, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("SECRET")

    with monkeypatch.context() as patch:
        patch.setattr(traced.service.engine._runner, "execute", fail)
        spans = [ask(traced, collector, form)[0] for form in (0, 1)]
    for span in spans:
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert plain(span.attributes)["error.type"] == "generation"
        assert plain(span.attributes)["gen_ai.response.finish_reasons"] == ["error"]
    assert ask(traced, collector, 0)[0].status.code == Status.STATUS_CODE_UNSET


def test_no_text_is_ever_told(traced: LiveServer, collector: Collector) -> None:
    _, answer = ask(traced, collector, 0)
    assert len(collector.raw) > 1000
    assert b"SECRET" not in collector.raw
    assert answer.json()["generated_text"].encode() not in collector.raw


def test_a_collector_that_is_gone_harms_nobody(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line when spans begin to be lost, one when they arrive again; and the server ends in time."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    collector = Collector()
    collector.status = 400
    server = LiveServer(tiny_folder, dtype="float32", otlp_endpoint=f"{collector.url}/v1/traces")
    caplog.set_level("INFO")
    try:
        with server.client() as client:

            def call() -> None:
                assert client.post("/generate", json=FORMS[0].body("SECRET", 2)).status_code == 200

            def said() -> list[str]:
                names = ("rivulet.tracing", "opentelemetry")
                lines = [record.getMessage() for record in caplog.records if record.name.startswith(names)]
                return [re.sub(r"http://\S+", "X", line) for line in lines]

            lost, again = (
                "the collector at X does not take traces: they are lost",
                "the collector at X takes traces again",
            )
            call()
            wait_for(lambda: said() == [lost])
            for _ in range(20):
                call()
                time.sleep(0.01)
            assert said() == [lost]
            collector.status = 200
            call()
            wait_for(lambda: said() == [lost, again])
            collector.stop()  # nothing listens there any more
            for _ in range(20):
                call()
        server.wait_until_idle()
    finally:
        began = time.monotonic()
        server.stop()
        ended = time.monotonic()
    assert ended - began < 4


def test_the_last_spans_are_sent_at_the_end(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of streams that the end cuts too, and nothing stays behind."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    collector = Collector()
    before = threading.active_count()
    server = LiveServer(tiny_folder, dtype="float32", otlp_endpoint=collector.url)
    try:
        with server.client() as client:
            assert client.post("/generate", json=FORMS[0].body("SECRET", 2)).status_code == 200
        with RawCall(server, FORMS[1], FORMS[1].body("SECRET", 500)) as running:
            running.read_events(1)
            assert collector.spans == []
            server.stop()
    finally:
        collector.stop()
    assert sorted(plain(span.attributes)["url.path"] for span in collector.servers()) == [
        "/generate",
        "/generate_stream",
    ]
    wait_for(lambda: threading.active_count() <= before)


def test_the_end_waits_a_moment_for_what_is_open() -> None:
    """Streams that are told an error need a few turns of the loop to end."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)

    async def serve(traces: Traces) -> None:
        scope = {"type": "http", "method": "POST", "path": "/generate", "scheme": "http", "headers": []}
        scope |= {"http_version": "1.1", "state": {"caller": Caller()}}
        request = asyncio.create_task(Tracing(app, traces)(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await traces.close()
        await request

    collector = Collector()
    asyncio.run(serve(Traces(collector.url, "model")))
    collector.stop()
    assert [span.name for span in collector.spans] == ["POST"]


@pytest.mark.parametrize("address", ["collector:4318", "ftp://collector", "http://", "http://a b"])
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    with pytest.raises(InvalidSettings, match="otlp_endpoint: begins with http"):
        parse_settings(ServeSettings, ["--otlp-endpoint", address], "rivulet serve")


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    """With every installed package but OpenTelemetry's; a folder of links stands for such an environment."""
    site = Path(httpx.__file__).parents[1]
    for entry in site.iterdir():
        if not entry.name.startswith(("opentelemetry", "__editable__", "_rivulet")):
            (tmp_path / entry.name).symlink_to(entry)
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RIVULET_")}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "server", "serve", "--otlp-endpoint", "http://127.0.0.1:4318"],
        env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "rivulet serve: otlp_endpoint: traces need more packages: pip install 'rivulet[otel]'\n"
    )
