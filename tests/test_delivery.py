"""Events on the wire: the same bytes as the standard library's JSON, in pieces that h11 would have made."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from live import LiveServer
from wire import ALL_FORMS, Form

from server.caller import PIECES
from server.edge.protocol import BoundedConnection
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.submission import Submission
from server.routes import openai_answers, tgi_answers
from server.routes.delivery import HOLE, EventForm, EventStream, event

ODD = '\0\x07\b\t\n\x0b\f\r\x1f "\\/\x7f\x85\xa0\u2028\u2029\ufeff\ufffd\uffff\u00e9\u6f22\U0001f60e'
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(ODD))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)


def plainly(data: Any) -> bytes:
    """An event by the standard library; three characters that clients take for the end of a line escaped."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "\x85\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f"data: {text}\n\n".encode()


@given(text=TEXTS)
@example(text=ODD)
def test_an_event_is_the_standard_librarys_json(text: str) -> None:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "more": [-1.25, 3, True]}
    assert event({"choices": [choice], text: 2**64 - 1}) == plainly({"choices": [choice], text: 2**64 - 1})


@given(value=VALUES)
def test_whatever_is_sent_is_read_as_it_was(value: Any) -> None:
    """Numbers may be spelt in another way: 1e-7 is 1e-07."""
    payload = event({"value": value}).removeprefix(b"data: ").removesuffix(b"\n\n").decode()
    assert json.loads(payload) == {"value": value}
    assert len(payload.splitlines()) == 1
    assert not {"\x85", "\u2028", "\u2029"} & set(payload)


@given(name=TEXTS.filter(lambda text: text != HOLE), value=VALUES)
@example(name='"\\u0000"', value={"text": HOLE})
def test_a_form_writes_what_an_event_of_the_whole_would_be(name: str, value: Any) -> None:
    form = EventForm({"model": name, "choices": [HOLE], "created": 1})
    for _ in range(2):
        assert form.fill(value) == event({"model": name, "choices": [value], "created": 1})


def test_a_form_differs_at_one_place() -> None:
    for data in ({"choices": []}, {"model": HOLE, "choices": [HOLE]}):
        with pytest.raises(ValueError, match="to unpack"):
            EventForm(data)


MODELS = {
    "/generate_stream": tgi_answers.StreamEvent,
    "/": tgi_answers.StreamEvent,
    "/v1/completions": openai_answers.CompletionChunk,
    "/v1/chat/completions": openai_answers.ChatCompletionChunk,
}
"""Where each event has the same fields; those of the other two dialects are told apart by their types."""


@pytest.mark.parametrize("form", [form for form in ALL_FORMS if form.stream], ids=str)
@pytest.mark.parametrize("prompt", ["1", "4", "6", "9", "x", "u"])
def test_every_event_is_the_same_bytes_as_its_models_own(
    form: Form, prompt: str, script_server: LiveServer
) -> None:
    """Of line ends, quotes, emoji, a character that never ends and special tokens."""
    with script_server.client() as client:
        answer = client.post(form.path, json=form.body(prompt, 24, ignore_eos=False))
    events = [line.encode() for line in answer.content.decode().split("\n") if line.startswith("data: {")]
    assert events
    for line in events:
        data = json.loads(line.removeprefix(b"data: "))
        assert line + b"\n\n" == plainly(data)
        if form.path in MODELS:
            dumped = MODELS[form.path].model_validate(data).model_dump(exclude_unset=True)
            assert line + b"\n\n" == plainly(dumped)


def connection(request: bytes) -> BoundedConnection:
    made = BoundedConnection()
    made.receive_data(request)
    while made.next_event() not in (h11.NEED_DATA, h11.PAUSED):
        pass
    return made


PARTS = (b"a", b"", b"x" * 15, b"y" * 16, b"data: 1\n\n" * 7000, b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "headers", "pieces"),
    [
        (b"GET / HTTP/1.1", [], PARTS),
        (b"GET / HTTP/1.1", [("Transfer-Encoding", "chunked")], PARTS),
        (b"GET / HTTP/1.1", [("Content-Length", "5")], (b"ab", b"", b"cde")),
        (b"GET / HTTP/1.0", [], PARTS),
        (b"HEAD / HTTP/1.1", [], (b"",)),
    ],
)
def test_a_body_is_framed_as_h11_does(
    request_line: bytes, headers: list[tuple[str, str]], pieces: tuple[bytes, ...]
) -> None:
    request = request_line + b"\r\nHost: a\r\n\r\n"
    ours, plain = connection(request), h11.Connection(h11.SERVER)
    plain.receive_data(request)
    while plain.next_event() not in (h11.NEED_DATA, h11.PAUSED):
        pass
    said: list[h11.Event] = [h11.Response(status_code=200, headers=headers)]
    said += [h11.Data(data=piece) for piece in pieces]
    said.append(h11.EndOfMessage())
    for one in said:
        assert ours.send(one) == plain.send(one)
        assert ours.states == plain.states


def test_a_connection_frames_each_answer_by_its_own_head() -> None:
    """A chunked one and one of a length in turn, and nothing after the end of either."""
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    made = connection(request)
    for headers, written in (([], b"3\r\nabc\r\n"), ([("Content-Length", "3")], b"abc")) * 2:
        made.send(h11.Response(status_code=200, headers=headers))
        assert made.send(h11.Data(data=b"abc")) == written
        made.send(h11.EndOfMessage())
        made.start_next_cycle()
        made.receive_data(request)
        while made.next_event() not in (h11.NEED_DATA, h11.PAUSED):
            pass
    made.send(h11.Response(status_code=200, headers=[]))
    made.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        made.send(h11.Data(data=b"abc"))


class Stub:
    """What an EventStream knows of a generation."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("extended", [False, True])
def test_pieces_go_past_the_middleware_and_the_head_does_not(extended: bool) -> None:
    through: list[Any] = []
    straight: list[Any] = []

    async def send(message: Any) -> None:
        through.append(message)

    async def to_socket(message: Any) -> None:
        straight.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def events() -> AsyncIterator[bytes]:
        yield event({"a": 1})
        yield event({"b": 2})

    stub = Stub()
    scope: dict[str, Any] = {"type": "http", "method": "POST"}
    if extended:
        scope["extensions"] = {PIECES: {"send": to_socket}}
    asyncio.run(EventStream(events(), stub)(scope, receive, send))  # type: ignore[arg-type]
    pieces = [b'data: {"a":1}\n\n', b'data: {"b":2}\n\n']
    assert [message["body"] for message in straight] == (pieces if extended else [])
    assert through[0]["type"] == "http.response.start" and not through[-1]["more_body"]
    assert [message["body"] for message in through[1:]] == [*([] if extended else pieces), b""]
    assert stub.closed == 1


def submission() -> tuple[Submission, list[str]]:
    given_up: list[str] = []
    requests = [Request(id=name, prompt_ids=(1,), params=None, max_tokens=9) for name in "ab"]  # type: ignore[arg-type]
    return Submission(requests, given_up.append), given_up


def test_outputs_come_in_order_however_they_arrive() -> None:
    async def scenario() -> None:
        made, given_up = submission()
        came: list[tuple[int, int]] = []

        async def read() -> None:
            async for index, output in made:
                came.append((index, output.cached_tokens))

        made.put(0, TokenOutput(cached_tokens=1))  # before anyone waits
        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        for count in (2, 3, 4):  # several at once, of which the first wakes the reader
            made.put(count % 2, TokenOutput(cached_tokens=count))
        await asyncio.sleep(0)
        made.put(1, TokenOutput(cached_tokens=5, finish_reason=FinishReason.EOS))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert came == [(0, 1), (0, 2), (1, 3), (0, 4), (1, 5)] and not reader.done()
        made.put(0, TokenOutput(cached_tokens=6, finish_reason=FinishReason.EOS))
        await asyncio.wait_for(reader, 1)
        assert came[-1] == (0, 6) and not given_up

    asyncio.run(scenario())


def test_a_reader_that_is_cancelled_leaves_outputs_in_peace() -> None:
    async def scenario() -> None:
        made, given_up = submission()
        reader = asyncio.ensure_future(anext(aiter(made)))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        made.put(0, TokenOutput())  # the future that it waited for is over
        made.close()
        assert sorted(given_up) == ["a", "b"]

    asyncio.run(scenario())
