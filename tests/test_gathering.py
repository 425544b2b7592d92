"""What is written in one turn of the event loop leaves together, whole, in order and in time."""

import asyncio
import json
import socket
from typing import Any

from live import LiveServer

from server.edge.gathering import MOST_BYTES, GatheringTransport


class Sink(asyncio.Transport):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.told.append(bytes(data))

    def close(self) -> None:
        self.told.append("close")
        self.closing = True

    def abort(self) -> None:
        self.told.append("abort")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 5


def test_pieces_of_a_turn_leave_in_one_write_before_the_loop_waits() -> None:
    async def work() -> None:
        transport = GatheringTransport(sink := Sink())
        for piece in (b"a", b"bc", b"d"):
            transport.write(piece)
        assert sink.told == []
        assert transport.get_write_buffer_size() == 5 + 4
        await asyncio.sleep(0)
        assert sink.told == [b"abcd"]
        assert transport.get_write_buffer_size() == 5
        transport.write(b"e")
        await asyncio.sleep(0)
        assert sink.told == [b"abcd", b"e"]

    asyncio.run(work())


def test_many_bytes_leave_at_once_so_that_the_transport_can_ask_to_wait() -> None:
    async def work() -> None:
        transport = GatheringTransport(sink := Sink())
        transport.write(b"a")
        transport.write(b"b" * MOST_BYTES)
        assert sink.told == [b"a" + b"b" * MOST_BYTES]
        transport.write(b"c")
        await asyncio.sleep(0)
        assert sink.told[1:] == [b"c"]

    asyncio.run(work())


def test_closing_writes_first_and_aborting_does_not() -> None:
    async def work() -> None:
        closed, aborted = Sink(), Sink()
        for sink, end in ((closed, GatheringTransport.close), (aborted, GatheringTransport.abort)):
            transport = GatheringTransport(sink)
            transport.write(b"last words")
            end(transport)
            await asyncio.sleep(0)
        assert closed.told == [b"last words", "close"]
        assert aborted.told == ["abort"]

    asyncio.run(work())


def test_what_is_written_to_one_that_was_lost_goes_nowhere() -> None:
    async def work() -> None:
        transport = GatheringTransport(sink := Sink())
        transport.write(b"a")
        sink.closing = True
        await asyncio.sleep(0)
        assert sink.told == []

    asyncio.run(work())


def test_the_last_events_of_a_stream_come_in_one_piece(tiny_server: LiveServer) -> None:
    """The finish, the usage and DONE are written in one turn: one read of the socket has them all."""
    wanted = {"model": tiny_server.name, "prompt": "1 2 3", "max_tokens": 1, "stream": True}
    body = json.dumps(wanted | {"stream_options": {"include_usage": True}}).encode()
    with socket.create_connection(("127.0.0.1", tiny_server.port), timeout=10) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        reads = []
        while data := client.recv(65536):
            reads.append(data)
    last = next(data for data in reads if b'finish_reason":"length' in data)
    assert b"completion_tokens" in last
    assert b"[DONE]" in last
