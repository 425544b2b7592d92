"""500 connections at once against a server process with its default limits, while /health is watched."""

import asyncio
import contextlib
import itertools
import json
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest
from soak.dialects import data_lines
from soak.fates import Faults
from soak.mix import Call, Mix
from soak.process import Server
from soak.raw import Address, Connection, connect, unchunk
from soak.watch import Health

pytestmark = pytest.mark.alone

CONNECTIONS = 500
TOKENS = 8
ROUNDS = 3
PLACES = 64 + 112
"""Those that run, and those of the waiting that are not kept for other clients."""
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
        assert statuses[200] >= PLACES, "not even the places that one client may have were taken"
        rounds.append(sorted(seconds)[int(0.99 * len(seconds))])
        print(statuses, [f"{1000 * s:.0f}" for s in sorted(seconds)[-5:]], len(seconds))
    # Each round has hundreds of answers; the middle round is not the one that another process spoiled.
    assert median(rounds) < HEALTH_P99, rounds


def test_a_full_server_says_so_at_once(server: Server) -> None:
    """The issue's own bound, while 64 streams run and as many wait as one client may have."""
    address = server.address
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 2000, "ignore_eos": True}}
    headers = {"Authorization": f"Bearer {address.key}"}
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES):
            call = stack.enter_context(socket.create_connection((address.host, address.port)))
            call.sendall(address.post("/generate_stream", body))
        client = stack.enter_context(httpx.Client(base_url=address.url, headers=headers, timeout=60))
        deadline = time.monotonic() + 30
        while held(client) < PLACES:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        seconds = []
        for path, stream in itertools.product(("/generate", "/v1/completions"), [False, True] * 20):
            asked = {"prompt": "a", "stream": stream} if path.startswith("/v1") else {"inputs": "a"}
            began = time.perf_counter()
            answer = client.post(path, json=asked)
            seconds.append(time.perf_counter() - began)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert held(client) == PLACES, "it was not full all the time"
    seconds.sort()
    print([f"{1000 * s:.0f}" for s in (median(seconds), *seconds[-3:])])
    assert seconds[int(0.99 * len(seconds))] < 0.1


def held(client: httpx.Client) -> int:
    """Requests that run or wait."""
    samples = (line.split() for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    values = {name: float(value) for name, *_, value in samples}
    return int(values["rivulet_requests_running"] + values["rivulet_requests_waiting"])
