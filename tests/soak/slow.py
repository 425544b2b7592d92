"""Slow clients: trickled heads and bodies, silence, rest, and readers that stop.

The server must answer, or close at its own deadline and not much later.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from soak.dialects import Failed, data_lines
from soak.fates import Fate, Faults, Wrong
from soak.mix import Call, Mix
from soak.raw import Address, Connection, connect, unchunk

SLACK = 3.0
"""Seconds after a deadline that a busy machine may need."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """What the server was started with, in seconds."""

    header: float
    body: float
    idle: float
    send: float


class SlowClients:
    """What slow clients share."""

    def __init__(self, address: Address, mix: Mix, faults: Faults, deadlines: Deadlines) -> None:
        self._address = address
        self._mix = mix
        self._faults = faults
        self._deadlines = deadlines

    async def slow(self, random: Random) -> Fate:
        """One of the ways to take long."""
        ways: tuple[Callable[[Random], Awaitable[Fate]], ...]
        ways = (self._silent, self._head, self._body, self._resting, self._stopped, self._sipping)
        began = time.monotonic()
        try:
            return await random.choice(ways)(random)
        except OSError as error:
            return self._faults.excuse_connection(error, began)

    async def _silent(self, random: Random) -> Fate:
        """Connects and says nothing."""
        async with connect(self._address) as connection:
            return await self._closed(connection, self._deadlines.header, "a silent connection")

    async def _head(self, random: Random) -> Fate:
        """One byte of the head after the other."""
        head = self._address.head("GET", "/health")[:-1]
        return await self._trickle(b"", head, self._deadlines.header, "a trickled head")

    async def _body(self, random: Random) -> Fate:
        """A head at once, then one byte of the body after the other."""
        head = self._address.head("POST", "/v1/completions", "Content-Length: 1000")
        return await self._trickle(head, b" " * 999, self._deadlines.body, "a trickled body")

    async def _resting(self, random: Random) -> Fate:
        """A request, and then rest on the open connection."""
        async with connect(self._address) as connection:
            await connection.send(self._address.head("GET", "/health"))
            if (status := await connection.status()) != 200:
                raise ConnectionError(f"/health answers {status}")
            return await self._closed(connection, self._deadlines.idle, "a resting connection")

    async def _stopped(self, random: Random) -> Fate:
        """A stream that is not read until long after the server's patience."""
        return await self._read_late(self._mix.endless(random, 400), 4096, self._deadlines.send + 1, 0)

    async def _sipping(self, random: Random) -> Fate:
        """A stream that is read slowly, but read: it must come whole."""
        fate = await self._read_late(self._mix.endless(random, 60), 16384, 0, 0.02)
        if fate is Fate.TOO_SLOW:
            raise Wrong("a stream that was read slowly was cut")
        return fate

    async def _read_late(self, call: Call, receive_buffer: int, rest: float, between: float) -> Fate:
        began, answer = time.monotonic(), b""
        async with connect(self._address, receive_buffer) as connection:
            await connection.send(self._address.post(call.path, call.body))
            await asyncio.sleep(rest)
            with contextlib.suppress(OSError):
                while data := await asyncio.wait_for(connection.reader.read(2048), 60):
                    answer += data
                    await asyncio.sleep(between)
        head, _, body = answer.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 429"):
            return Fate.BUSY
        if head.startswith(b"HTTP/1.1 503"):
            raise ConnectionError("a stream is answered with 503")
        events, whole = unchunk(body)
        if not whole:
            return Fate.TOO_SLOW
        try:
            call.judge(call.dialect.read_events(data_lines(events.decode())))
        except Failed as error:
            return self._faults.excuse_failure(str(error), began)
        return Fate.ANSWERED

    async def _trickle(self, first: bytes, rest: bytes, deadline: float, what: str) -> Fate:
        async with connect(self._address) as connection:
            with contextlib.suppress(OSError):
                await connection.send(first)

            async def drip() -> None:
                with contextlib.suppress(OSError):
                    for byte in rest:
                        await connection.send(bytes((byte,)))
                        await asyncio.sleep(0.1)

            dripping = asyncio.create_task(drip())
            try:
                return await self._closed(connection, deadline, what)
            finally:
                dripping.cancel()
                await asyncio.gather(dripping, return_exceptions=True)

    async def _closed(self, connection: Connection, deadline: float, what: str) -> Fate:
        """Wait for the server to close, not long before its deadline and not long after it."""
        began = time.monotonic()
        try:
            await asyncio.wait_for(connection.rest(), deadline + SLACK)
        except TimeoutError:
            raise Wrong(f"{what} is still open {SLACK} s after a deadline of {deadline} s") from None
        if time.monotonic() - began < deadline / 2:
            return self._faults.excuse_connection(EOFError(f"{what} was closed early"), began)
        return Fate.TOO_SLOW
