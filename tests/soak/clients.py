"""Proper clients: they ask for what may be asked and read to the end, or leave in the middle.

Each gives the fate that its request came to, or raises Wrong.
"""

import asyncio
import json
import time
from random import Random

import httpx

from soak.dialects import Failed, data_lines
from soak.fates import CROWDS, Fate, Faults, Wrong
from soak.mix import Call, Mix
from soak.raw import Address, connect

SHORTAGE = frozenset({"no memory"})
"""Of this a request is told as of a full queue: it may come again."""


class Clients:
    """What proper clients share."""

    def __init__(self, address: Address, mix: Mix, faults: Faults, http: httpx.AsyncClient) -> None:
        self._address = address
        self._mix = mix
        self._faults = faults
        self._http = http
        self._known: dict[int, str] = {}
        """Canary -> its text."""

    async def short(self, random: Random) -> Fate:
        """Quick questions."""
        return await self._ask(self._mix.short(random))

    async def long(self, random: Random) -> Fate:
        """Long prompts and long answers."""
        return await self._ask(self._mix.long(random))

    async def structured(self, random: Random) -> Fate:
        """Answers that must match something."""
        return await self._ask(self._mix.structured(random))

    async def leaving(self, random: Random) -> Fate:
        """Leaves while queued, during the prefill, or while tokens come; politely or not."""
        call, began = self._mix.long(random), time.monotonic()
        try:
            async with connect(self._address) as connection:
                await connection.send(self._address.post(call.path, call.body))
                if random.random() < 0.5:
                    await asyncio.sleep(random.choice((0, 0.005, 0.05)))
                else:
                    await asyncio.wait_for(connection.reader.read(random.randint(1, 2000)), 30)
                if random.random() < 0.5:
                    connection.reset()
        except OSError as error:
            return self._faults.excuse_connection(error, began)
        except TimeoutError:
            pass  # whoever waits in the queue for long leaves too
        return Fate.LEFT

    async def endless(self, random: Random) -> Fate:
        """A stream that runs for long."""
        return await self._ask(self._mix.endless(random, 400))

    async def canary(self, place: int) -> Fate:
        """Ask what is known: the text must be the one of the first time."""
        call = self._mix.canaries()[place]
        answer: list[str] = []
        began = time.monotonic()
        fate = await self._ask(call, answer, self._address.quiet_key)
        if fate is Fate.BUSY and not self._faults.touched(SHORTAGE, began):
            raise Wrong("a client that asks for one thing at a time was told to wait")
        if fate is Fate.ANSWERED and self._known.setdefault(place, answer[0]) != answer[0]:
            expected = self._known[place]
            raise Wrong(f"{call.dialect.name}: the canary says {answer[0]!r} instead of {expected!r}")
        return fate

    async def _ask(self, call: Call, answer: list[str] | None = None, key: str | None = None) -> Fate:
        began = time.monotonic()
        try:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            reply = await self._http.post(call.path, json=call.body, headers=headers)
            if reply.status_code != 200:
                return self._refused(call, reply, began)
            if call.stream:
                texts = call.dialect.read_events(data_lines(reply.text))
            else:
                texts = call.dialect.read(reply.json())
        except Failed as error:
            return self._faults.excuse_failure(f"{call.dialect.name}: {error}", began)
        except httpx.TransportError as error:
            return self._faults.excuse_connection(error, began)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Wrong(f"{call.dialect.name}: the answer is not as promised: {error!r}") from None
        call.judge(texts)
        if answer is not None:
            answer.append(texts[0].text)
        return Fate.ANSWERED

    def _refused(self, call: Call, reply: httpx.Response, began: float) -> Fate:
        """A status other than 200: busy, or told of a fault."""
        if reply.status_code == 429:
            if not reply.headers.get("retry-after", "").isdigit():
                raise Wrong("a 429 without Retry-After")
            return Fate.BUSY
        text = f"{call.dialect.name}: {reply.status_code}: {reply.text[:300]} to {json.dumps(call.body)}"
        if reply.status_code == 503 and self._faults.touched(CROWDS, began):
            return Fate.TURNED_AWAY
        if reply.status_code in (424, 500, 503):
            return self._faults.excuse_failure(text, began)
        raise Wrong(text)
