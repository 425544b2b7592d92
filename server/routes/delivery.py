"""How a generation reaches its client: as server-sent events, or collected into one answer.

Either way a client that leaves gives its blocks back; nothing polls for that.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from sse_starlette import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from server.generation import Generation

Result = TypeVar("Result")

PING_SECONDS = 15
"""A comment this often keeps proxies from closing a stream that waits in the queue."""

LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""No line ends in SSE or JSON, but huggingface_hub and httpx's iter_lines split a stream there."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one a call


class ClientLeft(Exception):
    """The client closed the connection before its answer was ready."""


class EventStream(EventSourceResponse):
    """Ready-made events as a response that closes its generation, even if it was never started."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events, ping=PING_SECONDS, sep="\n")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the events or the client end."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send; the deadline is the protocol's, and the library's scope for one costs 14 us a token."""
        await send(message)


def event(data: dict[str, Any]) -> bytes:
    """One event of compact JSON."""
    text = _encode(data)
    if not text.isascii():
        text = text.translate(LINE_ENDS)
    return b"data: " + text.encode() + b"\n\n"


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
