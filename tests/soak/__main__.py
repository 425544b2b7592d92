"""Warm-up, rest, soak, rest, end: what the process holds is compared between the two moments of rest.

Exit status 1 if a promise was broken; the last line is JSON. See `make soak`.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import httpx
from rich.console import Console

from soak.fates import Wrong
from soak.outside import OutsideFaults
from soak.process import Server
from soak.report import Findings, figures, show
from soak.run import LIMITS, Limits, Run, client_of
from soak.watch import Health, Invariants, poll

TINY = "tiny"
WIDTH = 110
"""Of the tables, where there is no screen."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser("make soak ARGS='...'", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of the soak itself")
    parser.add_argument("--warmup", type=float, help="seconds before it; default: a tenth")
    parser.add_argument("--clients", type=int, default=24, help="side by side")
    parser.add_argument("--seed", type=int, default=1, help="of clients and faults")
    parser.add_argument(
        "--fault-seconds", type=float, default=5, help="between two faults, inside and outside; 0: none"
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"as of `rivulet serve`, or {TINY}: a random one made for it"
    )
    parser.add_argument("--health-ms", type=float, default=100, help="p99 of /health, at most; 0: any")
    options = parser.parse_args(arguments)
    options.warmup = options.seconds / 10 if options.warmup is None else options.warmup
    return options


async def soak(options: argparse.Namespace, server: Server, limits: Limits, console: Console) -> Findings:
    """The whole of it."""
    began = time.monotonic()
    async with client_of(server) as http:
        model = await model_of(http)
        run = Run(server, http, model, limits)
        invariants = Invariants(limits.bounds, run.ledger)
        await run.canaries()
        await run.fill_pools()
        await run.clients(options.clients, options.warmup, f"{options.seed} warm-up")
        before = await run.rest()
        health = Health(server.address)
        watching = [poll(http, invariants, run.faults), progress(run, invariants, console)]
        if options.fault_seconds:
            outside = OutsideFaults(server, run.mix, run.faults, limits.max_connections)
            watching.append(outside.go_on(Random(options.seed), options.fault_seconds))
        async with background(run, *watching):
            await run.clients(options.clients, options.seconds, f"{options.seed} soak")
        server.spare()
        await run.canaries()
        faults = run.faults.done
        answers, statuses = health.stop(run.faults)
        if statuses:
            run.ledger.blame(f"/health answered {sorted(statuses)}")
        after = await run.rest()
        left = await run.idle()
        exit_status, exit_seconds = await run.end()
    return Findings(
        seconds=time.monotonic() - began,
        seed=options.seed,
        model=model,
        ledger=run.ledger,
        faults=faults,
        before=before,
        after=after,
        left=left,
        health=answers,
        health_bound=options.health_ms / 1000,
        pictures=invariants.pictures,
        most_running=invariants.most_running,
        most_waiting=invariants.most_waiting,
        exit_status=exit_status,
        exit_seconds=exit_seconds,
    )


async def model_of(http: httpx.AsyncClient) -> str:
    """The served model's name (Wrong)."""
    answer = await http.get("/v1/models")
    if answer.status_code != 200:
        raise Wrong(f"/v1/models answers {answer.status_code}: {answer.text}")
    return str(answer.json()["data"][0]["id"])


@asynccontextmanager
async def background(run: Run, *works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run these as long as the block; what one of them finds wrong, or fails by, is a broken promise."""

    async def guarded(work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (Wrong, Exception) as error:
            run.ledger.blame(f"watching: {error!r}")

    tasks = [asyncio.create_task(guarded(work)) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def progress(run: Run, invariants: Invariants, console: Console) -> None:
    """A line that changes: how long, how much, and whether all is well."""
    began = time.monotonic()
    with console.status("soaking") as status:
        while True:
            status.update(
                f"{time.monotonic() - began:.0f} s: {run.ledger.requests:,} requests, "
                f"{len(run.faults.done)} faults, {len(run.ledger.wrongs)} broken promises; "
                f"{invariants.running} running, {invariants.waiting} waiting"
            )
            await asyncio.sleep(0.5)


def make_tiny(folder: Path) -> str:
    """A random Llama with a byte tokenizer."""
    from checkpoints import byte_tokenizer, make_llama

    byte_tokenizer(folder)
    make_llama(folder, tie=True, seed=1, head_dim=32, max_positions=1024)
    return str(folder)


def main() -> int:
    """Soak, and tell."""
    options, console = parse(sys.argv[1:]), Console(stderr=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_tiny(folder / "tiny") if options.model == TINY else options.model
        arguments = LIMITS.arguments(model)
        try:
            server = stack.enter_context(Server(folder, options.seed, options.fault_seconds, arguments))
        except Wrong as wrong:
            print(f"soak: {wrong}", file=sys.stderr)
            return 1
        try:
            found = asyncio.run(soak(options, server, LIMITS, console))
        except (Wrong, httpx.TransportError) as error:
            status = "runs" if server.alive else f"ended with status {server.process.returncode}"
            print("".join(server.screen), f"soak: {error!r}; the server {status}", sep="", file=sys.stderr)
            return 1
    show(found, Console(width=None if sys.stdout.isatty() else WIDTH))
    for line in dict.fromkeys(server.screen if found.broken else ()):
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
    print(json.dumps(figures(found)))
    return 1 if found.broken else 0


sys.exit(main())
