"""500 connections at once against a server process with its default limits, while /health is watched."""

import asyncio
import contextlib
import json
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from soak.dialects import data_lines
from soak.fates import Faults
from soak.mix import Call, Mix
from soak.process import Server
from soak.raw import Address, Connection, connect, unchunk
from soak.watch import Health

CONNECTIONS = 500
TOKENS = 8
ROUNDS = 3
HEALTH_P99 = 0.1
"""Seconds: what the server promises."""


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`rivulet serve` with the default model, as users run it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    folder = tmp_path_factory.mktemp("load")
    with Server(folder, 0, 0, ["--model", str(smollm2_path), "--log-level", "error"]) as server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def burst(address: Address, calls: list[Call]) -> Counter[int]:
    """Open a connection for each call, then send all at once; gives how often each status came."""
    async with contextlib.AsyncExitStack() as stack:
        open_ = [await stack.enter_async_context(connect(address)) for _ in calls]
        asked = (asyncio.wait_for(ask(address, *pair), 60) for pair in zip(open_, calls, strict=True))
        return Counter(await asyncio.gather(*asked))


async def ask(address: Address, connection: Connection, call: Call) -> int:
    """One call; its answer must be whole, and say when to come again if it is a refusal."""
    await connection.send(address.post(call.path, call.body))
    head, _, body = (await connection.rest()).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status == 429:
        assert b"retry-after: 1" in head.lower()
        assert json.loads(body)["error"]["code"] == "overloaded"
        return status
    assert status == 200, head
    if call.stream:
        events, whole = unchunk(body)
        assert whole
        call.judge(call.dialect.read_events(data_lines(events.decode())))
    else:
        call.judge(call.dialect.read(json.loads(body)))
    return status


def test_every_one_is_served_or_told_to_come_again(server: Server) -> None:
    """No other fate, and /health answers throughout."""
    mix = Mix("tgi")  # any server takes this name
    rounds = []
    for number in range(ROUNDS):
        health = Health(server.address)
        statuses = asyncio.run(burst(server.address, mix.crowd(CONNECTIONS, TOKENS, number)))
        seconds, others = health.stop(Faults(list))
        assert others == set(), "/health did not answer"
        assert statuses.keys() == {200, 429}
        assert statuses.total() == CONNECTIONS
        assert statuses[200] >= 64 + 112, "not even the places that one client may have were taken"
        rounds.append(sorted(seconds)[int(0.99 * len(seconds))])
        print(statuses, [f"{1000 * s:.0f}" for s in sorted(seconds)[-5:]], len(seconds))
    # Each round has hundreds of answers; the middle round is not the one that another process spoiled.
    assert median(rounds) < HEALTH_P99, rounds
