"""Log lines, request ids and what errors show: nothing is forged, nothing of inside or text leaks."""

import http.client
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from wire import ALL_FORMS, JSON, Form, RawCall, typed_events, wait_for, without_id

from server.caller import CALLER, Caller
from server.logs import JsonFormatter, TextFormatter, configure

FORGED = "12:00:00 ERROR   rivulet.access: request method=GET path=/forged status=200"
ODD = {
    "LF": "\n",
    "CR": "\r",
    "CR LF": "\r\n",
    "NEL": "\x85",
    "VT, FF": "\x0b\x0c",
    "separators": "\x1c\x1d\x1e\x1f",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "NUL": "\x00",
    "ANSI": "\x1b[2K\x1b[1A\x1b]0;title\x07",
    "C1": "\x9b2K",
    "DEL": "\x7f",
    "backspace": "\b\b\b",
    "bidi": "\u202e\u2066\u200f\u061c",
    "no width": "\u200b\ufeff\u2060",
    "lone surrogate": "\ud800",
    "tag characters": "\U000e0041",
}
"""What must not come through; a terminal or a viewer would end a line there, or show another text."""
SECRET = "zq9zq9zq9"
LEAKS = re.compile(SECRET + r"|Traceback|File \"|0x[0-9a-f]{6,}|/home/|/root/|/tmp/|site-packages|\.py\b")
INSIDE = f'File "/home/{SECRET}/site-packages/x.py": <object at 0x7f00deadbeef>'
"""What an exception may say."""


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("rivulet.x", logging.INFO, "x.py", 1, message, arguments, None)
    vars(made).update(more)
    return made


@pytest.fixture
def caller() -> Iterator[Caller]:
    """The sender of a present request."""
    token = CALLER.set(Caller("here", "an-id"))
    yield Caller("here", "an-id")
    CALLER.reset(token)


# Lines


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_no_line_is_forged(formatter: logging.Formatter, odd: str) -> None:
    """By an argument, a field, an exception's text or a cause's."""
    content = f"a{odd}{FORGED}{odd}."
    try:
        try:
            raise KeyError(content)
        except KeyError:
            raise ValueError(content) from None
    except ValueError:
        fault = sys.exc_info()
    for made in (
        record("said %s", content),
        record("request", fields={"path": content, "outputs": [content]}),
        record("failed", exc_info=fault),
    ):
        line = formatter.format(made)
        line.encode()  # which a lone surrogate cannot be
        assert all(char.isprintable() or char == "\n" for char in line)
        first, *others = line.split("\n")
        if isinstance(formatter, JsonFormatter):
            assert not others and line.isascii()
            entry = json.loads(line)
            assert "traceback" in entry or content in (entry.get("path"), entry["message"][len("said ") :])
        assert FORGED in line
        assert not first.startswith(FORGED) and first.count("rivulet.x") == 1
        assert all(other.startswith("    ") for other in others), "only a traceback has more, all indented"
        assert bool(others) == (made.exc_info is not None and isinstance(formatter, TextFormatter))


def test_what_a_line_tells(caller: Caller) -> None:
    fields = {"path": "/a b", "status": 200, "client": "x=1", "inputs": ["é"], "none": None}
    made = record("request", fields=fields)
    line = TextFormatter().format(made)
    expected = '[an-id] request path="/a b" status=200 client="x=1" inputs=["é"] none=null'
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    rivulet\.x: " + re.escape(expected), line)
    entry = json.loads(JsonFormatter().format(made))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry.pop("time"))
    head = {"level": "info", "logger": "rivulet.x", "message": "request", "request_id": "an-id"}
    assert entry == head | fields


def test_the_line_of_another_library(caller: Caller) -> None:
    """That of uvicorn ends with a line end."""
    assert TextFormatter().format(record("Exception in %s\n", "x")).endswith(": [an-id] Exception in x")
    assert json.loads(JsonFormatter().format(record("x\n")))["message"] == "x"


# A line for each request


@pytest.fixture
def lines(
    tiny_server: LiveServer, script_server: LiveServer, caplog: pytest.LogCaptureFixture
) -> Callable[[], list[dict[str, Any]]]:
    """The fields of each request's line so far."""
    for server in (tiny_server, script_server):
        httpx.get(f"{server.url}/health")  # what came before has been logged by then
    caplog.clear()
    caplog.set_level(logging.INFO)
    return lambda: [vars(item)["fields"] for item in caplog.records if item.name == "rivulet.access"]


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_each_call_has_one_line(
    script_server: LiveServer, lines: Callable[[], list[dict[str, Any]]], form: Form
) -> None:
    with script_server.client() as client:
        answer = client.post(f"{form.path}?key={SECRET}", json=form.body("9", 5))
        assert answer.status_code == 200
    wait_for(lambda: bool(lines()))
    (line,) = lines()
    assert 0 < line.pop("seconds") < 30
    assert line.pop("prompt_tokens") >= 1
    path = form.path
    told = {"method": "POST", "path": path, "status": 200, "client": "127.0.0.1", "output_tokens": 5}
    assert line == told


def test_probes_and_errors(
    script_server: LiveServer, lines: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    """A probe that goes well is no news; of the others each has a line, with the path as it was sent."""
    odd = "/x%0d%0a12:00:00%20ERROR%20\\%e2%80%a8" + "y" * 500
    with script_server.client() as client:
        for path in ("/health", "/ready", "/ping", "/"):
            client.get(path)
        client.get("/metrics")
        client.get("/nothing?secret=1")
        client.post("/generate", content=b"{", headers=JSON)
        connection = http.client.HTTPConnection("127.0.0.1", script_server.port, timeout=10)
        connection.request("GET", odd)
        assert connection.getresponse().status == 404
        connection.close()
    wait_for(lambda: len(lines()) == 4)
    assert [line["status"] for line in lines()] == [200, 404, 422, 404]
    assert [line["path"] for line in lines()] == ["/metrics", "/nothing", "/generate", odd[:200]]
    assert all("prompt_tokens" not in line for line in lines())
    written = [TextFormatter().format(item) for item in caplog.records]
    assert not any("\n" in line for line in written)


def test_a_client_that_leaves_is_logged_with_what_it_got(
    tiny_server: LiveServer, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    for form in (Form("/generate_stream", True), Form("/generate", False)):
        with RawCall(tiny_server, form, form.body("a", 400)) as call:
            if form.stream:
                call.read_events(3)
            else:
                wait_for(lambda: tiny_server.stats.running == 1)
            call.leave(reset=True)
        tiny_server.wait_until_idle()
    wait_for(lambda: len(lines()) == 2)
    streamed, whole = lines()
    assert streamed["status"] == 200 and 3 <= streamed["output_tokens"] < 400
    assert whole["status"] == 499 and whole["output_tokens"] < 400


def test_texts_are_logged_if_asked_for_only(
    serve: Callable[..., LiveServer],
    script_server: LiveServer,
    script_folder: Path,
    lines: Callable[[], list[dict[str, Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = serve(script_folder, dtype="float32", log_prompts=True)
    caplog.set_level(logging.DEBUG)
    body = {"prompt": [f"{SECRET} 9"], "max_tokens": 30, "n": 2, "user": SECRET, SECRET: 1}
    wrong = {"prompt": SECRET, "max_tokens": 30, "stop": [SECRET] * 99}
    with server.client() as client, script_server.client() as silent:
        for _ in range(2):
            said = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        wait_for(lambda: len(lines()) == 2)
        assert lines()[1]["inputs"] == [f"{SECRET} 9"], "each prompt once"
        assert lines()[1]["outputs"] == [said] * 2 == ["\nA😎é漢. BCD"] * 2
        caplog.clear()
        silent.post("/v1/completions", json=body)
        assert silent.post("/v1/completions", json=wrong).status_code == 400
        silent.post("/v1/chat/completions", json={"messages": [{"role": SECRET, "content": SECRET}]})
        silent.post("/generate", content=f'{{"inputs": "{SECRET}', headers=JSON)
        wait_for(lambda: len(lines()) == 4)
    shown = [item for item in caplog.records if item.levelno > logging.DEBUG]
    assert SECRET not in str([vars(item) for item in shown])
    assert "漢" not in str([vars(item) for item in caplog.records])


# Request ids


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a", True),
        ("0af7651916cd43dd8448eb211c80319c", True),
        ("Req_1.2-3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ("a%0d%0ab", False),
        ("a;b", False),
        ('a"b', False),
        ("a]b", False),
        ("<script>", False),
        (b"\xc3\xa9", False),
        (b"a\x85b", False),
    ],
)
def test_a_request_keeps_its_id_if_it_is_one(
    script_server: LiveServer, given: str | bytes, kept: bool
) -> None:
    raw = given if isinstance(given, bytes) else given.encode()
    with script_server.client(headers=[(b"X-Request-Id", raw)]) as client:
        for path in ("/health", "/v1/models", "/v1/nothing", "/v1/messages", "/generate"):
            answer = client.get(path)
            told = answer.headers["x-request-id"]
            assert (told == given) == kept
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", told)
            assert answer.headers.get_list("x-request-id") == [told]
            # Anthropic's client looks for its id here.
            assert answer.headers.get("request-id") == (told if path == "/v1/messages" else None)
            if answer.status_code >= 400:
                without_id(answer.json(), answer)


def test_ids_that_are_made_differ(script_server: LiveServer) -> None:
    with script_server.client() as client:
        made = {client.get("/health").headers["x-request-id"] for _ in range(20)}
    assert len(made) == 20


def test_two_requests_may_have_one_id(tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's names must differ all the same."""
    runner = tiny_server.service.engine._runner
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda batch: time.sleep(0.005) or execute(batch))
    form = Form("/generate", False)
    with (
        tiny_server.client(headers={"X-Request-Id": "same"}) as client,
        client.stream("POST", "/generate_stream", json=form.body("a", 300)) as first,
    ):
        events = first.iter_lines()
        next(events)
        assert client.post("/generate", json=form.body("a", 3)).status_code == 200
        assert tiny_server.service.engine.num_requests == 1
        assert first.headers["x-request-id"] == "same"
    tiny_server.wait_until_idle()


# What errors show


class Failing:
    """Lets parts of a server fail, one after the other."""

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self._patch = monkeypatch

    def __call__(self, *arguments: object, **more: object) -> Any:
        raise RuntimeError(INSIDE)

    def tokenizer(self) -> None:
        """A fault of ours, outside of what the routes expect."""
        self._patch.setattr(self.server.service.tokenizer, "encode", self)

    def model(self) -> None:
        """The model fails in a step."""
        self._patch.setattr(self.server.service.engine._runner, "execute", self)

    def undo(self) -> None:
        self._patch.undo()


@pytest.fixture
def failing(tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    yield Failing(tiny_server, monkeypatch)
    monkeypatch.undo()
    tiny_server.wait_until_idle()


def last_event(form: Form, answer: httpx.Response) -> dict[str, Any]:
    """The error that ends a stream."""
    if form.path in ("/v1/messages", "/v1/responses"):
        return next(event for event in typed_events(answer.text) if event["type"] == "error")
    *_, last = [part for part in answer.text.split("\n\n") if part and "[DONE]" not in part]
    return dict(json.loads(last.removeprefix("data: ")))


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_an_error_shows_nothing_of_the_inside(
    failing: Failing, caplog: pytest.LogCaptureFixture, form: Form
) -> None:
    """Neither in an answer nor in a stream; the log has it, with the id that the client was told."""
    caplog.handler.setFormatter(JsonFormatter())
    with failing.server.client() as client:
        for fail, logger in ((failing.tokenizer, "uvicorn.error"), (failing.model, "rivulet.engine")):
            caplog.clear()
            fail()
            answer = client.post(form.path, json=form.body("9", 5))
            failing.undo()
            assert not LEAKS.search(answer.text + str(answer.headers)), answer.text
            if fail == failing.tokenizer or not form.stream:
                assert answer.status_code in (424, 500)
                without_id(answer.json(), answer)
            else:
                without_id(last_event(form, answer), answer)
            wait_for(lambda: "traceback" in caplog.text)
            logged = [json.loads(line) for line in caplog.text.splitlines()]
            told = [entry for entry in logged if "traceback" in entry]
            assert all(SECRET in entry["traceback"] for entry in told)
            assert all(entry["logger"] == logger for entry in told)
            named = answer.headers["x-request-id"]
            assert all(named == entry.get("request_id") or named in entry["message"] for entry in told)
            assert client.post(form.path, json=form.body("9", 5)).status_code == 200


def test_other_errors_show_nothing_either(tiny_server: LiveServer) -> None:
    """Each kind that a client can bring about, in each dialect; every body has its request's id."""
    paths = ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses")
    seen = set()
    with tiny_server.client() as client:
        for path in (*paths, "/tokenize"):
            for options in (
                {"content": b"{", "headers": JSON},
                {"content": b"\xff", "headers": JSON},
                {"content": json.dumps({SECRET: SECRET}), "headers": JSON},
                {"content": SECRET, "headers": {"Content-Type": SECRET}},
                {"content": b"[]", "headers": JSON},
                {"content": b'{"prompt": NaN, "inputs": NaN}', "headers": JSON},
                {"headers": {"Host": f"{SECRET}.example"}, "content": b"{}"},
            ):
                answer = client.post(path, **options)
                assert 400 <= answer.status_code < 500
                assert not LEAKS.search(answer.text + str(answer.headers)), answer.text
                without_id(answer.json(), answer)
                seen.add(answer.status_code)
            for method in ("DELETE", "PUT", "TRACE"):
                answer = client.request(method, f"{path}?{SECRET}")
                assert answer.status_code == 405
                without_id(answer.json(), answer)
            answer = client.get(f"{path}/{SECRET}")
            assert answer.status_code in (404, 405)
            assert not LEAKS.search(answer.text)
    assert {400, 403, 422} <= seen


def test_configure_has_one_handler() -> None:
    root = logging.getLogger()
    before, levels = (
        root.handlers[:],
        {name: logging.getLogger(name).level for name in ("", "rivulet", "uvicorn")},
    )
    try:
        for form, kind in (("text", TextFormatter), ("json", JsonFormatter)):
            configure("debug", form)  # type: ignore[arg-type]
            (handler,) = root.handlers
            assert isinstance(handler.formatter, kind)
    finally:
        root.handlers[:] = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
