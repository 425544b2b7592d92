"""One run against one server: the clients with their seeds, the known answers, and the moments of rest."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import httpx

from soak.clients import Clients
from soak.fates import Fate, Faults, Ledger, Wrong
from soak.hostile import HostileClients
from soak.mix import Mix
from soak.process import Holdings, Server
from soak.slow import Deadlines, SlowClients
from soak.watch import Bounds, calls_without_end, read_metrics

HANG = 90.0
"""Seconds after which a request counts as forgotten."""
RUSH = 40
"""Calls at once."""
WEIGHTS = {"short": 10, "long": 4, "structured": 4, "leaving": 5, "slow": 2, "hostile": 6}

Client = Callable[[Random], Awaitable[Fate]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server is started with: so tight that every limit is met."""

    bounds: Bounds
    deadlines: Deadlines
    max_body: int = 200_000
    max_connections: int = 120
    shutdown: float = 10

    def arguments(self, model: str) -> list[str]:
        """The same as flags of `rivulet serve`."""
        flags = {
            "model": model,
            "max-model-len": 1024,
            "kv-cache-tokens": 4096,
            "max-running": self.bounds.max_running,
            "max-waiting": self.bounds.max_waiting,
            "max-body-bytes": self.max_body,
            "max-connections": self.max_connections,
            "header-timeout": self.deadlines.header,
            "body-timeout": self.deadlines.body,
            "idle-timeout": self.deadlines.idle,
            "send-timeout": self.deadlines.send,
            "step-timeout": 30,
            "shutdown-timeout": self.shutdown,
            "log-level": "error",
        }
        return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


LIMITS = Limits(Bounds(max_running=8, max_waiting=16), Deadlines(header=1, body=1, idle=2, send=1))


class Run:
    """The clients of a server, and what became of their requests."""

    def __init__(self, server: Server, http: httpx.AsyncClient, model: str, limits: Limits) -> None:
        self.server = server
        self.http = http
        self.mix = Mix(model)
        self.limits = limits
        self.ledger = Ledger()
        self.faults = Faults(server.faults)
        address = server.address
        self._proper = Clients(address, self.mix, self.faults, http)
        slow = SlowClients(address, self.mix, self.faults, limits.deadlines)
        hostile = HostileClients(address, self.faults, limits.max_body)
        self._kinds: dict[str, Client] = {
            "short": self._proper.short,
            "long": self._proper.long,
            "structured": self._proper.structured,
            "leaving": self._proper.leaving,
            "slow": slow.slow,
            "hostile": hostile.hostile,
        }

    async def request(self, kind: str, client: Awaitable[Fate]) -> Fate | None:
        """One request of one client, whose end is noted whatever it is."""
        try:
            fate = await asyncio.wait_for(client, HANG)
        except Wrong as wrong:
            self.ledger.blame(f"{kind}: {wrong}")
        except TimeoutError:
            self.ledger.blame(f"{kind}: no end after {HANG:.0f} s")
        except Exception as error:
            self.ledger.blame(f"{kind}: {error!r}")
        else:
            self.ledger.count(kind, fate)
            return fate
        return None

    async def clients(self, count: int, seconds: float, seed: str) -> None:
        """So many clients, each with one request after the other, until the time is over."""
        deadline = time.monotonic() + seconds
        await asyncio.gather(
            self._ask_canaries(deadline),
            self._rush(deadline, Random(seed)),
            *(self._client(deadline, Random(f"{seed} {number}")) for number in range(count)),
        )

    async def _client(self, deadline: float, random: Random) -> None:
        while time.monotonic() < deadline and self.server.alive:
            (kind,) = random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            if await self.request(kind, self._kinds[kind](random)) is Fate.BUSY:
                await asyncio.sleep(random.random() / 4)

    async def _rush(self, deadline: float, random: Random) -> None:
        """Now and then more at once than there are places."""
        while time.monotonic() < deadline and self.server.alive:
            calls = (self.request("rush", self._proper.short(random)) for _ in range(RUSH))
            await asyncio.gather(*calls)
            await asyncio.sleep(random.uniform(1, 5))

    async def _ask_canaries(self, deadline: float) -> None:
        while time.monotonic() < deadline and self.server.alive:
            await self.canaries()
            await asyncio.sleep(0.2)

    async def canaries(self) -> None:
        """Each known question once; its text is compared with that of the first time."""
        for place in range(len(self.mix.canaries())):
            began = time.monotonic()
            if await self.request("canary", self._proper.canary(place)) is Fate.ANSWERED:
                self.ledger.canaries.append(began)

    async def fill_pools(self) -> None:
        """Work for every thread, and every process of templates, that is started only when there is work."""
        said = {"messages": [{"role": "user", "content": "word " * 2000}]}
        count = [self.http.post("/v1/messages/count_tokens", json=said) for _ in range(40)]
        for answer in await asyncio.gather(*count):
            assert answer.status_code in (200, 503), answer.text
        tokenize = [self.http.post("/tokenize", json={"inputs": "word " * 2000}) for _ in range(40)]
        structured = [self._kinds["structured"](Random(number)) for number in range(16)]
        await asyncio.gather(*tokenize, *(self.request("structured", one) for one in structured))

    async def idle(self) -> dict[str, float]:
        """Wait until the server says that it has nothing to do; gives what it says it holds."""
        deadline = time.monotonic() + 20
        names = ("requests_running", "requests_waiting", "cache_blocks_used")
        while True:
            answer = await self.http.get("/metrics", headers={"Connection": "close"})
            samples, _ = read_metrics(answer.text)
            held = {name.replace("_", " "): samples[f"rivulet_{name}[]"] for name in names}
            held["calls without an end"] = calls_without_end(samples)
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.1)

    async def rest(self) -> Holdings:
        """What the process holds once it is idle and every connection that rests is closed."""
        await self.idle()
        await asyncio.sleep(self.limits.deadlines.idle + 0.5)
        return self.server.holdings()

    async def end(self) -> tuple[int | None, float]:
        """SIGTERM while streams run: each must come to an end; gives the exit status and the seconds."""
        streams = [
            asyncio.create_task(self.request("at the end", self._proper.endless(Random(number))))
            for number in range(6)
        ]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        with self.faults.during("told to end"):
            self.server.process.terminate()
            await asyncio.gather(*streams)
            while self.server.alive and time.monotonic() < began + self.limits.shutdown + 10:
                await asyncio.sleep(0.02)
        return self.server.process.poll(), time.monotonic() - began


def client_of(server: Server) -> httpx.AsyncClient:
    """Many connections, none of which rests so long that the server would close it just when it is used."""
    return httpx.AsyncClient(
        base_url=server.address.url,
        headers={"Authorization": f"Bearer {server.address.key}"},
        timeout=HANG,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=0.3),
    )
