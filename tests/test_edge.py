"""What stands between socket and routes: bounds, deadlines, one reading of a request, TLS; on raw sockets."""

import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from wire import FORMS, JSON, Background, metric, native_events, wait_for

from server.config import InvalidSettings, ServeSettings, parse_settings

pytestmark = pytest.mark.alone

SOON = 0.6
"""Seconds that the server of most tests gives a client."""
SLACK = 4.0
"""Seconds that a busy machine may take longer."""
PATIENCE = 30.0
"""Seconds of the deadlines that a test does not want to meet."""


@pytest.fixture(scope="module")
def hasty(serve: Callable[..., LiveServer], long_folder: Path) -> LiveServer:
    """A server with short deadlines."""
    times = {"header_timeout": SOON, "body_timeout": SOON, "idle_timeout": 2 * SOON, "send_timeout": 2 * SOON}
    return serve(long_folder, dtype="float32", **times)


@pytest.fixture(autouse=True)
def nothing_stays(hasty: LiveServer) -> Iterator[None]:
    """After each test the next good request is served and every connection is gone."""
    yield
    with hasty.client() as client:
        assert FORMS[0].text(client.post(FORMS[0].path, json=FORMS[0].body("good", 3))) != ""
    hasty.wait_until_idle()
    wait_for(lambda: connections(hasty) == 0, SLACK)


def connections(server: LiveServer) -> int:
    return len(server._server.server_state.connections)


def connect(server: LiveServer, seconds: float = PATIENCE) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=seconds)


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes (TimeoutError if it does not)."""
    received = b""
    with contextlib.suppress(ConnectionError):  # what we sent and it did not read makes it a reset
        while data := connection.recv(65536):
            received += data
    return received


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = connection.recv(65536)
        assert data, received
        received += data
    return received


def probe(server: LiveServer, *parts: bytes) -> bytes:
    """Send parts, and give all that comes back until the server closes."""
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        return read(connection)


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def error_of(received: bytes, path: str = "") -> str:
    """The text of the one error that was received, in the dialect of the path."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")[1:]
    assert "connection: close" in lines
    assert "content-type: application/json" in lines
    assert f"content-length: {len(body)}" in lines
    data = json.loads(body)
    data.pop("request_id", None)
    if path == "/v1/messages":
        assert data["type"] == "error" and set(data["error"]) >= {"type", "message"}
        return str(data["error"]["message"])
    if path.startswith("/v1"):
        assert set(data["error"]) >= {"message", "type", "param", "code"}
        return str(data["error"]["message"])
    assert list(data) == ["error", "error_type"]
    return str(data["error"])


def head(*fields: bytes, line: bytes = b"GET /health HTTP/1.1") -> bytes:
    return b"\r\n".join((line, b"Host: x", *fields, b"", b""))


def post(body: bytes, *fields: bytes, path: bytes = b"/generate") -> bytes:
    return head(b"Content-Type: application/json", *fields, line=b"POST " + path + b" HTTP/1.1") + body


def many(count: int, size: int = 1) -> list[bytes]:
    return [b"X-%d: %s" % (index, b"v" * size) for index in range(count)]


CLOSE = b"Connection: close"
SMUGGLED = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"

HEADS: dict[str, tuple[bytes, int]] = {
    "100 fields": (head(CLOSE, *many(98)), 200),
    "101 fields": (head(CLOSE, *many(99)), 431),
    "50,000 fields": (head(*many(50_000)), 431),
    "a field of 60 kB": (head(CLOSE, b"X: " + b"v" * 60_000), 200),
    "a field of 66 kB": (head(b"X: " + b"v" * 66_000), 431),
    "a field of 5 MB": (head(b"X: " + b"v" * 5_000_000), 431),
    "90 fields of 1 kB": (head(*many(90, 1000)), 431),
    "a path of 70 kB": (head(line=b"GET /" + b"a" * 70_000 + b" HTTP/1.1"), 431),
    "an endless path": (b"GET /" + b"a" * 1_000_000, 431),
    "an endless name": (b"GET / HTTP/1.1\r\n" + b"a" * 1_000_000, 431),
    "HEAD with 101 fields": (head(*many(100), line=b"HEAD /health HTTP/1.1"), 431),
    "both lengths": (post(SMUGGLED, b"Content-Length: 5", CHUNKED), 400),
    "both lengths the other way": (post(SMUGGLED, CHUNKED, b"Content-Length: 5"), 400),
    "two lengths": (post(SMUGGLED, b"Content-Length: 5", b"Content-Length: 6"), 400),
    "two lengths in one field": (post(SMUGGLED, b"Content-Length: 5, 6"), 400),
    "a length with a sign": (post(SMUGGLED, b"Content-Length: +5"), 400),
    "a negative length": (post(SMUGGLED, b"Content-Length: -5"), 400),
    "a hexadecimal length": (post(SMUGGLED, b"Content-Length: 0x5"), 400),
    "a length in other digits": (post(SMUGGLED, "Content-Length: \u0665".encode()), 400),
    "a length of 5,000 digits": (post(SMUGGLED, b"Content-Length: " + b"1" * 5000), 400),
    "a length of 20 digits": (post(SMUGGLED, b"Content-Length: " + b"1" * 20), 413),
    "an unknown coding": (post(SMUGGLED, b"Transfer-Encoding: gzip, chunked"), 400),
    "a coding that is nearly chunked": (post(SMUGGLED, b"Transfer-Encoding: \x0bchunked"), 400),
    "chunked twice": (post(SMUGGLED, CHUNKED, CHUNKED), 400),
    "a space before the colon": (post(SMUGGLED, b"Content-Length : 5"), 400),
    "a space in a name": (head(b"Content Length: 5"), 400),
    "a NUL in a name": (head(b"X\0: 1"), 400),
    "a NUL in a value": (head(b"X: a\0b"), 400),
    "a bare CR in a value": (head(b"X: a\rb"), 400),
    "a name alone": (head(b"Content-Length"), 400),
    "a folded first line": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (head(b"Host: y"), 400),
    "a negative chunk": (post(b"-5\r\nabcde\r\n", CHUNKED), 400),
    "a chunk with a sign": (post(b"+5\r\nabcde\r\n", CHUNKED), 400),
    "a chunk that is longer than it says": (post(b"1\r\nabcde\r\n0\r\n\r\n", CHUNKED), 400),
    "a chunk of 30 digits": (post(b"f" * 30 + b"\r\na\r\n", CHUNKED), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\n" * 100, 400),
    "HTTP/0.9": (head(line=b"GET /health HTTP/0.9"), 400),
    "nonsense": (b"\xff\xfe\xfd\r\n\r\n", 400),
}


@pytest.mark.parametrize(("sent", "status"), HEADS.values(), ids=HEADS.keys())
def test_a_head_is_read_in_one_way_or_not_at_all(hasty: LiveServer, sent: bytes, status: int) -> None:
    """One answer, then the end of the connection, whatever was sent after it."""
    received = probe(hasty, sent)
    assert statuses(received) == [status]
    if status != 200:
        error_of(received)


def test_large_heads_are_not_kept(hasty: LiveServer) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    probe(hasty, head(b"X: " + b"v" * 1_000_000))
    before = resident()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(connect(hasty))
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"v" * 3_000_000)
        assert resident() - before < 20e6


PATHS = ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"]
HALVES = {
    "nothing": b"",
    "half a line": b"GET /hea",
    "half a field": b"GET /health HTTP/1.1\r\nHost",
    "all but a line": b"GET /health HTTP/1.1\r\nHost: x\r\n",
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES.keys())
def test_a_head_that_does_not_end(hasty: LiveServer, half: bytes) -> None:
    started = time.monotonic()
    received = probe(hasty, half)
    assert SOON <= time.monotonic() - started < SOON + SLACK
    assert statuses(received) == [408]
    assert error_of(received) == "the request's head did not come in time"


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_does_not_end(hasty: LiveServer, path: str) -> None:
    """In the dialect of the path; however the length is told."""
    for fields, part in (
        (b"Content-Length: 50", b"{"),
        (b"Content-Length: 50", b""),
        (CHUNKED, b"1\r\n{\r\n"),
    ):
        started = time.monotonic()
        received = probe(hasty, post(part, fields, path=path.encode()))
        assert SOON <= time.monotonic() - started < SOON + SLACK
        assert statuses(received) == [408]
        assert error_of(received, path) == "the request's body did not come in time"


def trickle(connection: socket.socket, text: bytes) -> float:
    """Send byte after byte until the server closes; gives the seconds that it took."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for index in range(len(text)):
            connection.sendall(text[index : index + 1])
            time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nX: ", post(b"{", b"Content-Length: 500")])
def test_bytes_now_and_then_buy_no_time(hasty: LiveServer, start: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(start)
        assert trickle(connection, b"a" * 200) < SOON + SLACK
        assert statuses(read(connection)) in ([408], [])  # a reset may overtake it


def test_every_request_has_its_own_deadlines(hasty: LiveServer) -> None:
    """A connection may be kept for longer than any of them, while it does something."""
    good = post(b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}', b"Content-Length: 52")
    with connect(hasty) as connection:
        started = time.monotonic()
        while time.monotonic() - started < 3 * SOON:
            time.sleep(SOON / 4)
            connection.sendall(good[:20])
            time.sleep(SOON / 4)
            connection.sendall(good[20:-5])
            time.sleep(SOON / 4)
            connection.sendall(good[-5:])
            assert b'"generated_text"' in read_until(connection, b"}")
        connection.sendall(good[:20])
        assert statuses(read(connection)) == [408]


def test_a_connection_that_rests_is_closed_without_a_word(hasty: LiveServer) -> None:
    with connect(hasty) as connection:
        connection.sendall(head())
        assert statuses(connection.recv(65536)) == [200]
        started = time.monotonic()
        assert read(connection) == b""
        assert SOON < time.monotonic() - started < 2 * SOON + SLACK


def test_a_head_that_began_before_the_answer_ended(hasty: LiveServer) -> None:
    """Its deadline begins with the end of the answer."""
    with connect(hasty) as connection:
        connection.sendall(head() + head()[:-2])
        started = time.monotonic()
        assert statuses(read(connection)) == [200, 408]
        assert time.monotonic() - started < SOON + SLACK


def test_a_body_that_nobody_waits_for(hasty: LiveServer) -> None:
    """Answered already, it is read for a while, and its end is awaited no longer than another's."""
    with connect(hasty) as connection:
        connection.sendall(head(b"Content-Length: 1000000", line=b"GET /health HTTP/1.1"))
        started = time.monotonic()
        trickle(connection, b"a" * 200)
        assert time.monotonic() - started < SOON + SLACK


def test_a_long_stream_meets_no_deadline_of_its_request(hasty: LiveServer) -> None:
    form = FORMS[1]
    with hasty.client() as client:
        started = time.monotonic()
        answer = client.post(form.path, json=form.body("long", 1500))
        assert len(native_events(answer.text)) == 1500
        assert time.monotonic() - started > 1.5 * SOON, "too fast to show anything"


FORMS_OF_BROWSERS = (
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "Multipart/Mixed",
)
FLOODS = {
    "deep": b'{"inputs": "a", "x": ' + b"[" * 64 + b"]" * 64 + b"}",
    "deep in turns": b'{"inputs": "a", "x": ' + b'[{"a": ' * 32 + b"1" + b"}]" * 32 + b"}",
    "deep beside strings": b'{"]": "]\\"]\\\\", "x": ' + b'["]",' * 64 + b"1" + b"]" * 64 + b"}",
    "many objects": b'{"inputs": "a", "x": [' + b"{}," * 8192 + b"1]}",
    "many lists": b'{"inputs": "a", "x": [' + b"[]," * 600_000 + b"1]}",
    "messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 50_000}).encode(),
    "items": json.dumps({"input": [{"role": "user", "content": "a"}] * 50_000}).encode(),
}


def generating(server: LiveServer) -> list[str]:
    """Every path that takes a body."""
    with server.client() as client:
        found = client.get("/openapi.json").json()["paths"]
    return [path for path, methods in found.items() if "post" in methods and "{" not in path]


def test_forms_are_refused_unread(hasty: LiveServer) -> None:
    paths = generating(hasty)
    assert set(PATHS) < set(paths)
    for path in paths:
        for media_type in FORMS_OF_BROWSERS:
            fields = (f"Content-Type: {media_type}".encode(), b"Content-Length: 1999999")
            received = probe(hasty, head(*fields, line=f"POST {path} HTTP/1.1".encode()))
            assert statuses(received) == [400 if path.startswith("/v1") else 422], path
            assert "Content-Type: application/json" in error_of(received, path.removesuffix("/count_tokens"))


@pytest.mark.parametrize("body", FLOODS.values(), ids=FLOODS.keys())
def test_small_things_without_end_are_refused_at_once(hasty: LiveServer, body: bytes) -> None:
    assert len(body) < 2_000_000
    with hasty.client() as client:
        for path in generating(hasty):
            answer = client.post(path, content=body, headers=JSON)
            assert answer.status_code == (400 if path.startswith("/v1") else 422), path
            assert "64 levels" in answer.text or "8192 objects" in answer.text
            assert answer.headers["connection"] == "close"


FINE = {
    "deep enough": b'{"inputs": "a", "x": ' + b"[" * 63 + b"]" * 63 + b"}",
    "brackets in a text": json.dumps({"inputs": '[{"\\' * 50, "x": "[{" * 400_000}).encode(),
    "8,192 objects": b'{"inputs": "a", "x": [' + b"{}," * 8190 + b"1]}",
    "many numbers": b'{"inputs": "a", "x": [' + b"1," * 600_000 + b"1]}",
    "many strings": b'{"inputs": "a", "x": [' + b'"",' * 600_000 + b"1]}",
}


@pytest.mark.parametrize("body", FINE.values(), ids=FINE.keys())
def test_what_only_looks_like_it_is_served(hasty: LiveServer, body: bytes) -> None:
    with hasty.client() as client:
        answer = client.post("/tokenize", content=body, headers=JSON)
        assert answer.status_code == 200, answer.text


def test_a_body_in_crumbs(hasty: LiveServer) -> None:
    """Each piece costs the event loop as much as a large one."""
    crumbs = b"1\r\n \r\n" * 200_000
    received = probe(hasty, post(crumbs, CHUNKED))
    assert statuses(received) == [413]
    assert "16384 pieces" in error_of(received)
    text = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in text.ljust(10_000)) + b"0\r\n\r\n"
    assert statuses(probe(hasty, post(pieces, CHUNKED, CLOSE))) == [200]


def test_large_bodies_do_not_hold_others_up(hasty: LiveServer) -> None:
    """A probe of the server's health is answered while bodies of all kinds come in."""
    bodies: list[tuple[str, bytes]] = [
        ("/generate", b'{"inputs": "' + b"x" * 1_000_000 + b'"}'),
        ("/v1/completions", b'{"prompt": [' + b"1," * 900_000 + b"1]}"),
        ("/v1/responses", FLOODS["items"]),
        ("/v1/chat/completions", FLOODS["messages"]),
        ("/v1/responses", b'{"input": [' + b"{}," * 600_000 + b"1]}"),
        ("/tokenize", b'{"inputs": "' + b"x" * 100_000 + b'"}'),
        ("/v1/responses", b'{"input": [' + b"{}," * 8000 + b"1]}"),
        ("/v1/responses", b'{"input": [' + b"1," * 900_000 + b"1]}"),
        ("/v1/messages", b'{"max_tokens": 1, "messages": [' + b"{}," * 8000 + b"1]}"),
        ("/generate", b'{"inputs": "a", "x": [' + b'"",' * 600_000 + b"1]}"),
    ]
    over = threading.Event()
    waits: list[float] = []

    def ask() -> None:
        with hasty.client() as client:
            while not over.is_set():
                started = time.perf_counter()
                assert client.get("/health").status_code == 200
                waits.append(time.perf_counter() - started)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with hasty.client() as client:
            for path, body in bodies:
                answer = client.post(path, content=body, headers=JSON)
                assert answer.status_code in (200, 400, 422), answer.text
    finally:
        over.set()
        asking.join()
    waits.sort()
    assert waits[len(waits) // 2] < 0.1
    assert waits[-1] < 1


@pytest.fixture
def narrow(tiny_folder: Path) -> Iterator[LiveServer]:
    """A server that takes six connections, and waits two seconds for a head."""
    server = LiveServer(tiny_folder, dtype="float32", max_connections=6, header_timeout=2)
    yield server
    server.stop()


def test_connections_are_bounded_and_nobody_holds_them(narrow: LiveServer) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(narrow)) for _ in range(6)]
        wait_for(lambda: connections(narrow) == 6)
        for _ in range(5):
            received = probe(narrow)
            assert statuses(received) == [503]
            assert b"retry-after: 1\r\n" in received.lower()
            assert error_of(received) == "the server has as many connections as it takes"
        held[0].close()
        wait_for(lambda: connections(narrow) == 5)
        with narrow.client() as client:
            assert client.get("/health").status_code == 200
        wait_for(lambda: connections(narrow) == 0, 2 + SLACK)  # they are all still open on the other side
        assert [statuses(read(connection)) for connection in held[1:]] == [[408]] * 5
        with narrow.client() as client:
            assert FORMS[0].text(client.post(FORMS[0].path, json=FORMS[0].body("a", 3))) is not None


def far_away(server: LiveServer) -> socket.socket:
    """A connection of small packets, as over a real network, whose client has little room for them."""
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
    connection.connect(("127.0.0.1", server.port))
    return connection


def sip(connection: socket.socket, size: int, over: threading.Event) -> None:
    """Read a little now and then."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while not over.wait(0.1) and connection.recv(size):
            pass


@pytest.mark.parametrize(
    "sips", [0, 1, 2048], ids=["stops", "reads single bytes", "reads as slowly as a modem"]
)
def test_a_reader_that_stops_is_cut(hasty: LiveServer, sips: int) -> None:
    """While its call still runs; the others are not slowed down, and its place and blocks come back."""
    form, neighbour = FORMS[5], FORMS[1]
    over = threading.Event()
    aborted = metric(hasty, "requests_total", fate="aborted")
    # 25 MB of events, more than any buffer takes.
    content = json.dumps(form.body("sleeper", 3900, n=4, logprobs=20)).encode()
    with far_away(hasty) as sleeper:
        sleeper.sendall(post(content, b"Content-Length: %d" % len(content), path=form.path.encode()))
        assert sleeper.recv(1) == b"H"
        (held,) = hasty._server.server_state.connections
        options = held.transport.get_extra_info("socket").getsockopt
        assert options(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 300_000, "by default it would hold megabytes"
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert options(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2 * SOON * 1000
        reader = threading.Thread(target=sip, args=(sleeper, sips, over))
        if sips:
            reader.start()
        try:
            call = Background(hasty, neighbour, neighbour.body("neighbour", 50))
            assert call.text() != ""
            wait_for(lambda: connections(hasty) == 0, 2 * SOON + 2 * SLACK)
            hasty.wait_until_idle()
            assert metric(hasty, "requests_total", fate="aborted") == aborted + 4
        finally:
            over.set()
            if sips:
                reader.join()


def test_an_answer_that_nobody_takes(hasty: LiveServer) -> None:
    """All of it is written, as far as the application sees; still its connection ends."""
    request = head(line=b"GET /openapi.json HTTP/1.1")
    with far_away(hasty) as connection:
        connection.sendall(request * 12)
        wait_for(lambda: connections(hasty) == 1)
        wait_for(lambda: connections(hasty) == 0, 4 * SOON + 2 * SLACK)


def test_a_slow_reader_who_reads_gets_everything(hasty: LiveServer) -> None:
    """Longer than the deadline, for there is progress; all of it waits at once, unlike a stream."""
    content = b'{"inputs": "' + b"x" * 60_000 + b'"}'
    with socket.socket() as connection:
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", hasty.port))
        length = b"Content-Length: %d" % len(content)
        connection.sendall(post(content, length, CLOSE, path=b"/tokenize"))
        received = connection.recv(1)
        started = time.monotonic()
        while data := connection.recv(32768):
            received += data
            time.sleep(0.05)
        assert time.monotonic() - started > 2 * 2 * SOON, "too fast to show anything"
    assert len(json.loads(received.partition(b"\r\n\r\n")[2])) == 60_000


def test_who_took_an_answer_is_not_cut_in_the_next(hasty: LiveServer) -> None:
    """What an answer ended with was written, not left unread; and a deadline ends with its own answer."""

    def awaited() -> bool:
        (protocol,) = hasty._server.server_state.connections
        return protocol._sending._timer is not None

    with socket.socket() as connection:
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        connection.sendall(head(line=b"GET /health HTTP/1.1"))
        read_until(connection, b"\r\n\r\n")
        assert not awaited()
        for _ in range(20):  # until the system holds no more
            connection.sendall(head(line=b"GET /openapi.json HTTP/1.1"))
        wait_for(awaited)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 20 or not received.endswith(b"}"):
            received += connection.recv(65536)
        content = b'{"inputs": "go on", "parameters": {"max_new_tokens": 1000, "ignore_eos": true}}'
        length = b"Content-Length: %d" % len(content)
        connection.sendall(post(content, length, path=b"/generate_stream"))
        read_until(connection, b"\r\n\r\n")
        assert not awaited()


# TLS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody but itself has signed, and its key."""
    return make_pair(tmp_path_factory.mktemp("tls"))


def make_pair(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    names = ("-subj", "/CN=rivulet", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ["openssl", "req", *kind, *names, "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, capture_output=True, timeout=60, check=True)
    except FileNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("there is no openssl command, which makes the certificate")
    return certificate, key


@pytest.fixture(scope="module")
def encrypted(serve: Callable[..., LiveServer], tiny_folder: Path, pair: tuple[Path, Path]) -> LiveServer:
    certificate, key = pair
    return serve(
        tiny_folder,
        dtype="float32",
        tls_certificate=certificate,
        tls_key=key,
        header_timeout=SOON,
        send_timeout=2 * SOON,
    )


def test_tls(encrypted: LiveServer, pair: tuple[Path, Path]) -> None:
    trusted = ssl.create_default_context(cafile=str(pair[0]))
    with httpx.Client(base_url=f"https://127.0.0.1:{encrypted.port}", verify=trusted) as client:
        for form in FORMS:
            assert form.text(client.post(form.path, json=form.body("secret", 40))) is not None
    for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        outdated = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        outdated.check_hostname, outdated.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="deprecated"):
            outdated.minimum_version = outdated.maximum_version = old
        with pytest.raises((ssl.SSLError, ConnectionError)), connect(encrypted) as connection:
            outdated.wrap_socket(connection)


def test_deadlines_within_tls(encrypted: LiveServer, pair: tuple[Path, Path]) -> None:
    for sent in (b"", b"\x16\x03\x01"):  # no handshake, half a handshake
        started = time.monotonic()
        assert probe(encrypted, sent) == b""
        assert time.monotonic() - started < SOON + SLACK
    assert statuses(probe(encrypted, head())) == []  # one who does not know that it is encrypted
    trusted = ssl.create_default_context(cafile=str(pair[0]))
    with connect(encrypted) as plain, trusted.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(b"GET / HT")
        received = read(connection)
        assert statuses(received) == [408]
    wait_for(lambda: connections(encrypted) == 0, SLACK)


def test_files_that_cannot_serve_tls(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Each mistake in one sentence, before a model is loaded."""
    certificate, key = pair
    (tmp_path / "other").mkdir()
    _, other_key = make_pair(tmp_path / "other")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    secret = tmp_path / "secret.pem"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(secret), "-passout", "pass:x"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"certificate": certificate}, "give both or neither"),
        ({"key": key}, "give both or neither"),
        ({"certificate": tmp_path / "none", "key": key}, "tls_certificate: cannot read .*No such file"),
        ({"certificate": certificate, "key": tmp_path}, "tls_key: cannot read .*directory"),
        ({"certificate": certificate, "key": other_key}, "is not that of the certificate"),
        ({"certificate": nonsense, "key": key}, "are not a certificate and its key"),
        ({"certificate": certificate, "key": nonsense}, "are not a certificate and its key"),
        ({"certificate": certificate, "key": secret}, "are not a certificate and its key"),
    ]
    for files, message in cases:
        flags = [part for name, file in files.items() for part in (f"--tls-{name}", str(file))]
        with pytest.raises(InvalidSettings, match=message) as caught:
            parse_settings(ServeSettings, flags, "rivulet serve")
        assert len(str(caught.value).splitlines()) == 1


def test_the_first_screen_says_https(tiny_folder: Path, pair: tuple[Path, Path]) -> None:
    """The command itself, with a good pair and with a bad one."""
    rivulet = (sys.executable, "-m", "server", "serve")
    certificate, key = map(str, pair)
    bad = [*rivulet, "--tls-certificate", certificate, "--tls-key", certificate]
    result = subprocess.run(bad, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"rivulet serve: .* are not a certificate and its key, .*\n", result.stderr)
    good = ["--model", str(tiny_folder), "--port", "0", "--tls-certificate", certificate, "--tls-key", key]
    with subprocess.Popen([*rivulet, *good], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            screen = iter(process.stderr)
            address = next(found[1] for line in screen if (found := re.search(r" on (https://\S+)", line)))
            trusted = ssl.create_default_context(cafile=certificate)
            assert httpx.get(f"{address}/health", verify=trusted, timeout=30).status_code == 200
        finally:
            process.terminate()
        assert process.wait(30) == 0
