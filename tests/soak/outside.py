"""Faults that need no hook: what an operator's bad day does to a process from outside."""

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from random import Random

from soak.fates import Faults
from soak.mix import Mix
from soak.process import Server
from soak.raw import connect

NARROW = 4
"""Descriptors that are left while there are too few."""


class OutsideFaults:
    """Does one thing after the other to a server that goes on serving."""

    def __init__(self, server: Server, mix: Mix, faults: Faults, max_connections: int) -> None:
        self._server = server
        self._mix = mix
        self._faults = faults
        self._max_connections = max_connections

    async def go_on(self, random: Random, seconds: float) -> None:
        """A fault every so many seconds, for ever."""
        kinds: list[tuple[str, Callable[[Random], Awaitable[None]]]] = [
            ("process paused", self._pause),
            ("no descriptors", self._narrow),
            ("crowd of connections", self._crowd),
            ("broken connections", self._break),
        ]
        while True:
            for name, act in random.sample(kinds, len(kinds)):
                await asyncio.sleep(random.uniform(0.5, 1.5) * seconds)
                with self._faults.during(name):
                    await act(random)

    async def _pause(self, random: Random) -> None:
        """Stop the process, as a debugger or a full machine does."""
        self._server.process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(1)
        finally:
            self._server.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.2)

    async def _narrow(self, random: Random) -> None:
        """Leave hardly a descriptor to the process."""
        pid = self._server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + NARROW, before[1]))
        try:
            await asyncio.sleep(1)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        await asyncio.sleep(1.5)  # asyncio accepts again a second after it could not

    async def _crowd(self, random: Random) -> None:
        """Open more connections than the server keeps."""
        async with contextlib.AsyncExitStack() as crowd:
            for _ in range(self._max_connections + 20):
                with contextlib.suppress(OSError):
                    await crowd.enter_async_context(connect(self._server.address))
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.2)

    async def _break(self, random: Random) -> None:
        """Many streams at once that end by RST, each at a moment of its own."""

        async def one() -> None:
            call = self._mix.endless(random, 50)
            with contextlib.suppress(OSError):
                async with connect(self._server.address) as connection:
                    await connection.send(self._server.address.post(call.path, call.body))
                    await asyncio.sleep(random.random() / 2)
                    connection.reset()

        await asyncio.gather(*(one() for _ in range(30)))
