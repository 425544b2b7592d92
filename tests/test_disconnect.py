"""A client that leaves, at any point and in any way, gives its place and its blocks back within a second."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import LiveServer
from wire import ALL_FORMS, FORMS, Background, Form, RawCall, metric, num_tasks, wait_for

from server.engine.records import EngineStats

STREAMS = [form for form in ALL_FORMS if form.stream]
ENDLESS = 480
"""Output tokens of a call that would go on for about half a second."""
SOON = 1.0
"""Seconds."""

Serve = Callable[..., LiveServer]
Alone = Callable[[LiveServer, int], str]


@pytest.fixture(scope="module")
def one_place(serve: Serve, tiny_folder: Path) -> LiveServer:
    """A server that computes one request at a time; others wait."""
    return serve(tiny_folder, dtype="float32", max_running=1, max_waiting=3)


@pytest.fixture(scope="module")
def slow_prefill(serve: Serve, long_folder: Path) -> LiveServer:
    """A server that needs hundreds of steps for a long prompt."""
    return serve(long_folder, dtype="float32", max_running=4, token_budget=8)


@pytest.fixture(autouse=True)
def never_too_fast(
    one_place: LiveServer, slow_prefill: LiveServer, tiny_server: LiveServer
) -> Iterator[None]:
    """On any machine a call lasts until its test finds it in the state in which its client is to leave."""
    with one_place.slowed(0.001), slow_prefill.slowed(0.001), tiny_server.slowed(0.001):
        yield


@pytest.fixture(params=[False, True], ids=["FIN", "RST"])
def reset(request: pytest.FixtureRequest) -> bool:
    """How the client leaves."""
    return bool(request.param)


LEAVES = [(form, index // 2 % 2 == 1) for index, form in enumerate(ALL_FORMS)]
"""Each form with one way to leave, so that answers and streams have both."""
NEIGHBOUR = STREAMS[0]


@pytest.fixture(scope="module")
def alone() -> Alone:
    """What the neighbour gets when nobody else is there, asked once a server."""
    texts: dict[tuple[str, int], str] = {}

    def ask(server: LiveServer, tokens: int) -> str:
        key = (server.url, tokens)
        if key not in texts:
            with server.client() as client:
                answer = client.post(NEIGHBOUR.path, json=NEIGHBOUR.body("neighbour", tokens))
                texts[key] = NEIGHBOUR.text(answer)
        return texts[key]

    return ask


def neighbour(server: LiveServer, tokens: int) -> Background:
    """Another client's call, once it runs."""
    server.wait_until_idle()
    call = Background(server, NEIGHBOUR, NEIGHBOUR.body("neighbour", tokens))
    wait_for(lambda: server.stats.running == 1)
    return call


def aborted(server: LiveServer) -> float:
    return metric(server, "requests_total", fate="aborted")


@pytest.mark.parametrize(("form", "reset"), LEAVES, ids=str)
def test_while_queued(one_place: LiveServer, alone: Alone, form: Form, reset: bool) -> None:
    text = alone(one_place, 200)
    before, made = aborted(one_place), metric(one_place, "generated_tokens_total")
    running = neighbour(one_place, 200)
    with RawCall(one_place, form, form.body("queued", ENDLESS)) as call:
        wait_for(lambda: one_place.stats.waiting == 1)
        call.leave(reset=reset)
        wait_for(lambda: one_place.stats.waiting == 0 and one_place.service.engine.num_requests == 1, SOON)
    assert not running.done, "too slow to show anything"
    assert running.text() == text
    one_place.wait_until_idle(SOON)
    assert aborted(one_place) == before + 1
    assert metric(one_place, "generated_tokens_total") == made + 200


@pytest.mark.parametrize(("form", "reset"), LEAVES, ids=str)
def test_in_prefill(slow_prefill: LiveServer, alone: Alone, form: Form, reset: bool) -> None:
    text = alone(slow_prefill, 150)
    before, made = aborted(slow_prefill), metric(slow_prefill, "generated_tokens_total")
    running = neighbour(slow_prefill, 150)
    prompt = f"{form} {reset} " * 200  # one that no cache knows
    with RawCall(slow_prefill, form, form.body(prompt[:3900], 100)) as call:
        wait_for(lambda: slow_prefill.stats.running == 2 and slow_prefill.stats.blocks_used > 30)
        call.leave(reset=reset)
        wait_for(lambda: slow_prefill.service.engine.num_requests <= 1, SOON)
        wait_for(lambda: slow_prefill.stats.running <= 1, SOON)
    assert slow_prefill.stats.blocks_used < 30
    assert running.text() == text
    slow_prefill.wait_until_idle(SOON)
    assert aborted(slow_prefill) == before + 1
    assert metric(slow_prefill, "generated_tokens_total") == made + 150  # it never came to its first token


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("form", STREAMS, ids=str)
def test_in_decode(tiny_server: LiveServer, alone: Alone, form: Form, tokens: int, reset: bool) -> None:
    text = alone(tiny_server, 100)
    before = aborted(tiny_server)
    running = neighbour(tiny_server, 100)
    with RawCall(tiny_server, form, form.body("decode", ENDLESS)) as call:
        call.read_events(tokens)
        call.leave(reset=reset)
        wait_for(lambda: tiny_server.service.engine.num_requests <= 1, SOON)
    assert running.text() == text
    tiny_server.wait_until_idle(SOON)
    assert aborted(tiny_server) == before + 1


@pytest.mark.parametrize("form", [form for form in ALL_FORMS if not form.stream], ids=str)
def test_in_decode_of_an_answer(tiny_server: LiveServer, form: Form, reset: bool) -> None:
    tiny_server.wait_until_idle()
    before, made = aborted(tiny_server), metric(tiny_server, "generated_tokens_total")
    with RawCall(tiny_server, form, form.body("decode", 470)) as call:
        wait_for(lambda: metric(tiny_server, "generated_tokens_total") > made + 20)
        call.leave(reset=reset)
        tiny_server.wait_until_idle(SOON)
    assert aborted(tiny_server) == before + 1
    assert metric(tiny_server, "generated_tokens_total") < made + 470, "nobody noticed"


CANDIDATES: list[tuple[Form, dict[str, object], int]] = [
    *((form, {"n": 3}, 3) for form in FORMS[4:]),
    *((form, {}, 3) for form in FORMS[4:6]),  # of three prompts
    *((form, {"best_of": 2, "do_sample": True}, 2) for form in FORMS[:4] if not form.stream),
]
"""Forms of call that are several requests of the engine: what asks for them, and how many."""


STATES: dict[str, Callable[[EngineStats, int], bool]] = {
    "queued": lambda stats, count: (stats.running, stats.waiting) == (1, count),
    "one runs": lambda stats, count: (stats.running, stats.waiting) == (1, count - 1),
    "in prefill": lambda stats, count: stats.running >= 1 and stats.blocks_used > 3,
    "in decode": lambda stats, count: stats.running == count,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("form", "more", "count"), CANDIDATES, ids=str)
def test_all_choices_are_given_up(
    one_place: LiveServer,
    slow_prefill: LiveServer,
    form: Form,
    more: dict[str, object],
    count: int,
    state: str,
) -> None:
    """Above all those that wait for the first one's prompt, to share it."""
    server = one_place if state in ("queued", "one runs") else slow_prefill
    server.wait_until_idle()
    before, reset = aborted(server), form.stream
    prompt = f"{form} {more} ".ljust(900) if state == "in prefill" else "short"  # one that no cache knows
    body = form.body(prompt, ENDLESS if server is one_place else 3000, **more)
    if form.path == "/v1/completions" and "n" not in more:
        body["prompt"] = [f"{text} {prompt}" for text in range(count)]
    with contextlib.ExitStack() as calls:
        if state == "queued":
            calls.enter_context(RawCall(server, NEIGHBOUR, NEIGHBOUR.body("neighbour", ENDLESS)))
            wait_for(lambda: server.stats.running == 1)
        call = calls.enter_context(RawCall(server, form, body))
        wait_for(lambda: STATES[state](server.stats, count))
        call.leave(reset=reset)
        wait_for(lambda: server.service.engine.num_requests == (state == "queued"), SOON)
        wait_for(lambda: server.stats.waiting == 0, SOON)
    server.wait_until_idle(SOON)
    server.service.engine._scheduler.check()
    assert aborted(server) == before + count + (state == "queued")


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_before_the_response_starts(tiny_server: LiveServer, form: Form) -> None:
    """The call is sent and the connection closed at once: whether it was admitted or not, nothing stays."""
    body = form.body("gone", ENDLESS)
    for pause in (0, 0, 0.0005, 0.001, 0.002, 0.004):
        for reset in (False, True):
            with RawCall(tiny_server, form, body) as call:
                time.sleep(pause)
                call.leave(reset=reset)
    tiny_server.wait_until_idle(SOON)
    with tiny_server.client() as client:
        assert form.text(client.post(form.path, json=form.body("next", 3))) is not None


def test_a_request_that_is_never_finished(tiny_server: LiveServer) -> None:
    """Half a head or half a body, and then nothing."""
    for part in (b"POST /generate HT", b"POST /generate HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
            connection.sendall(part)
    with tiny_server.client() as client:
        assert client.get("/health").status_code == 200
    tiny_server.wait_until_idle(SOON)


def test_a_half_closed_connection_counts_as_gone(tiny_server: LiveServer) -> None:
    with RawCall(tiny_server, STREAMS[0], STREAMS[0].body("half", ENDLESS)) as call:
        call.read_events(2)
        call.socket.shutdown(socket.SHUT_WR)
        tiny_server.wait_until_idle(SOON)


def test_a_reader_that_stops_reading(slow_prefill: LiveServer, alone: Alone) -> None:
    """Its stream stands still once all buffers are full; others go on, and when it leaves all comes back."""
    text = alone(slow_prefill, 100)
    form = FORMS[5]
    body = form.body("sleeper", 3900, n=3, logprobs=20)  # some 20 MB of events

    def delivered() -> float:
        return metric(slow_prefill, "generated_tokens_total")

    def stands_still() -> bool:
        before = delivered()
        time.sleep(0.15)
        return delivered() == before

    with RawCall(slow_prefill, form, body, receive_buffer=4096) as sleeper:
        sleeper.read_events(1)
        wait_for(stands_still, 20)
        assert slow_prefill.stats.running == 3, "the engine goes on"
        call = Background(slow_prefill, NEIGHBOUR, NEIGHBOUR.body("neighbour", 100))
        assert call.text() == text
        assert slow_prefill.stats.running == 3, "too fast to show anything"
        sleeper.leave(reset=True)
        slow_prefill.wait_until_idle(SOON)


def counts(server: LiveServer) -> dict[str, int]:
    """What a broken stream could leave behind."""
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return {
        "tasks": num_tasks(server),
        "threads": len(threads),
        "files": len(os.listdir("/proc/self/fd")),
        "blocks": server.stats.blocks_used,
        "requests": server.service.engine.num_requests,
    }


def settled_counts(server: LiveServer) -> dict[str, int]:
    """The counts once half a second has changed none of them: a connection ends a little after its call."""
    server.wait_until_idle()
    last: dict[str, int] = {}
    while last != (last := counts(server)):
        time.sleep(0.5)
    return last


def resident_bytes() -> int:
    """Of this process, server included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def unused_server(tiny_folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(tiny_folder, dtype="float32", max_waiting=600)
    yield server
    server.stop()


def test_5000_broken_calls_leave_nothing(unused_server: LiveServer) -> None:
    """Of all forms, many at once, left at any point by connections that close in either way."""
    server = unused_server
    address = ("127.0.0.1", server.port)
    messages = [RawCall.message(form, form.body(f"broken {n}", 100)) for form in ALL_FORMS for n in range(5)]

    def broken(first: int, count: int) -> None:
        """All calls are sent before the first is given up; every fourth is read a little."""
        sockets = [socket.create_connection(address) for _ in range(count)]
        for index, connection in enumerate(sockets, first):
            connection.sendall(messages[index % len(messages)])
        for index, connection in enumerate(sockets, first):
            if index % 4 == 0 and ALL_FORMS[index % len(messages) // 5].stream:
                connection.recv(4096)
            if index % 2 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    for index in range(0, 500, 100):  # what is made once and kept: threads of the pool, caches of allocators
        broken(index, 100)
    before, size = settled_counts(server), resident_bytes()
    for index in range(0, 5000, 100):
        broken(index, 100)
    assert settled_counts(server) == before
    assert resident_bytes() - size < 5000 * 4096
    server.service.engine._scheduler.check()
    fates = {fate: metric(server, "requests_total", fate=fate) for fate in ("aborted", "length", "error")}
    assert fates["aborted"] > 1000, fates
    assert fates["error"] == 0
    with server.client() as client:
        for form in ALL_FORMS:
            assert form.text(client.post(form.path, json=form.body("next", 3))) is not None
