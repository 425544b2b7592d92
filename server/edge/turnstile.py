"""Spreads requests that come at once over turns of the event loop, so that they hold nobody else up.

Without it five hundred begin in one turn, and until all have begun there is no answer to a probe, and no
next token for anyone. Whoever asks alone goes through at once.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge.gate import PROBES

PER_TURN = 1
"""Requests that begin in one turn of the loop; each costs it half a millisecond, on a slow machine two."""


class Turnstile:
    """ASGI middleware: lets requests in by turns, in the order in which they came; probes go past it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._queue: deque[asyncio.Future[None]] = deque()
        self._passed = 0
        """Those of this turn."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, in this turn or a later one."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._wait()
        await self.app(scope, receive, send)

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._passed:
            loop.call_soon(self._turn)
        if self._passed < PER_TURN:
            self._passed += 1
            return
        place = loop.create_future()
        self._queue.append(place)
        await place

    def _turn(self) -> None:
        """The next turn: so many more may begin."""
        self._passed = 0
        while self._queue and self._passed < PER_TURN:
            place = self._queue.popleft()
            if not place.done():  # else its client has left
                place.set_result(None)
                self._passed += 1
        if self._passed:
            asyncio.get_running_loop().call_soon(self._turn)
