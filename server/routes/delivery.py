"""How a generation reaches its client: as server-sent events, or collected into one answer.

Either way a client that leaves gives its blocks back; nothing polls for that.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from server.caller import PIECES
from server.generation import Generation

Result = TypeVar("Result")

PING_SECONDS = 15
"""A comment this often keeps proxies from closing a stream that waits in the queue."""

LINE_ENDS = {char.encode(): b"\\u%04x" % ord(char) for char in "\x85\u2028\u2029"}
"""No line ends in SSE or JSON, but huggingface_hub and httpx's iter_lines split a stream there."""


class ClientLeft(Exception):
    """The client closed the connection before its answer was ready."""


class EventStream(EventSourceResponse):
    """Ready-made events as a response that closes its generation, even if it was never started."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events, ping=PING_SECONDS, sep="\n")
        self._generation = generation
        self._straight: Send | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events or the client end."""
        if PIECES in scope.get("extensions", ()):
            self._straight = scope["extensions"][PIECES]["send"]
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()

    def _send_with_timeout(  # type: ignore[override]  # which is a coroutine: the library only awaits it
        self, send: Send, message: Message
    ) -> Awaitable[None]:
        """Send; the deadline is the protocol's, and the library's scope for one costs 14 us a token."""
        if self._straight is None or message["type"] == "http.response.start":
            return send(message)
        return self._straight(message)


def encode(value: Any) -> bytes:
    """Compact JSON on one line, whatever a client takes for the end of a line."""
    text = to_json(value)  # in a fifth of the time that the standard library takes
    if not text.isascii():
        for char, escaped in LINE_ENDS.items():
            text = text.replace(char, escaped)
    return text


def event(data: dict[str, Any]) -> bytes:
    """One event of compact JSON."""
    return b"data: " + encode(data) + b"\n\n"


HOLE = "\0"
"""Stands in the data of an EventForm for the one value that its events differ by."""


class EventForm:
    """Events that differ by a single value: what stands before and behind it is encoded once."""

    def __init__(self, data: dict[str, Any]) -> None:
        before, *behind = event(data).split(to_json(HOLE))
        (self._behind,) = behind
        self._before = before

    def fill(self, value: Any) -> bytes:
        """The event with this value."""
        return b"%b%b%b" % (self._before, encode(value), self._behind)


def typed_event(data: dict[str, Any]) -> bytes:
    """The same, named by its `type`."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


async def unless_client_leaves(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves (ClientLeft)."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        left.cancel()
        task.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _client_leaves(request: HttpRequest) -> None:
    """Wait for the end of the connection; the body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
