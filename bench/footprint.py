"""What a server takes beside its model's arithmetic: seconds to ready, memory, CPU a token by thread.

Starts `rivulet serve` as users do, with a small KV cache, and loads it over HTTP from this process. CPU times
are the system's, of each thread of the server (/proc/*/task/*/schedstat). The last line is JSON.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import table as tables
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(peers.ROOT))
from model.machine import usable_cores
from server.bench_http import Address, Broken, Unreachable
from server.bench_load import Answer, BenchError, Load, calibrate, find_dialect, read, run

MOST_MEGABYTES, MOST_SECONDS, MOST_MICROSECONDS = 600, 2.0, 60
"""The goals: resident set, seconds to ready, CPU of the event loop's thread a token."""

LOOP, ENGINE = "rivulet-http", "rivulet-engine"  # the threads' names, where Python tells the system (3.14)
SPARE_TOKENS = 10
"""Of each request: prompts are a few tokens longer or shorter than asked for."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Seconds of CPU by thread."""

    loop: float
    """The event loop's thread: HTTP, tokenizing the prompts, detokenizing, events."""
    engine: float
    """The engine's thread: scheduler, sampling, and its own part in the crew's work."""
    others: tuple[float, ...]
    """The crew's other threads, and whatever else there is."""

    @property
    def engine_python(self) -> float:
        """What the engine's thread did beyond the busiest other one: an estimate, as if all shared evenly."""
        return max(self.engine - max(self.others, default=0.0), 0.0)


def cpu(process: int) -> dict[int, tuple[str, float]]:
    """Name and seconds of CPU of each thread, by its id."""
    found = {}
    for folder in Path(f"/proc/{process}/task").iterdir():
        nanoseconds = (folder / "schedstat").read_text().split()[0]  # stat counts whole ticks, of 10 ms
        found[int(folder.name)] = ((folder / "comm").read_text().strip(), int(nanoseconds) / 1e9)
    return found


def shares(process: int, before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> Shares:
    """What each thread did in between; without names the loop's is the oldest, the engine's the busiest."""
    spent = {thread: seconds - before.get(thread, ("", 0.0))[1] for thread, (_, seconds) in after.items()}
    spent = {thread: seconds for thread, seconds in spent.items() if seconds and thread != process}
    named = {name: thread for thread, (name, _) in after.items()}
    loop = spent.pop(named.get(LOOP, min(spent)), 0.0)
    engine = spent.pop(named.get(ENGINE, max(spent, key=spent.__getitem__)), 0.0)
    return Shares(loop, engine, tuple(sorted(spent.values(), reverse=True)))


def resident(process: int) -> float:
    """Megabytes that are in memory now."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(process)


async def load(server: peers.Running, given: argparse.Namespace) -> dict[str, Any]:
    """Fill the pool once, then stream for the CPU times (BenchError, Broken, Unreachable)."""
    address = Address.parse(server.url)
    process = server.process.pid
    each = given.kv_cache_tokens // given.clients
    prompt = each // 2
    size = Load(given.clients, given.clients, prompt, each - prompt - SPARE_TOKENS)
    before_load = resident(process)
    dialect = await find_dialect(address, "auto", None)
    prompts = await calibrate(address, dialect, prompt)

    async def streams(requests: int) -> list[Answer]:
        part = Load(size.clients, requests, size.prompt_tokens, size.output_tokens)
        return [
            read(dialect, stream) for stream in await run(address, dialect, part, prompts, lambda done: None)
        ]

    filled = await streams(size.clients)
    after_load = resident(process)
    before = cpu(process)
    answers = await streams(given.clients * given.turns)
    spent = shares(process, before, cpu(process))
    tokens = sum(answer.output_tokens for answer in answers)
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    used = sum((answer.prompt_tokens or prompt) + answer.output_tokens for answer in filled)
    return {
        "resident_mb": {"ready": round(before_load, 1), "after_load": round(after_load, 1)},
        "tokens_in_the_pool": used,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "cpu_us_per_token": {
            "event_loop": round(spent.loop / tokens * 1e6, 1),
            "engine_thread": round(spent.engine / tokens * 1e6, 1),
            "engine_python_estimate": round(spent.engine_python / tokens * 1e6, 1),
            "other_threads": [round(seconds / tokens * 1e6, 1) for seconds in spent.others],
        },
    }


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Several starts, the last of them loaded (PeerError, and what `load` raises)."""
    command = (
        *(sys.executable, "-m", "server", "serve", "--model", given.model, "--host", peers.HOST),
        *("--port", "{port}", "--kv-cache-tokens", str(given.kv_cache_tokens), "--log-level", "warning"),
        *("--threads", str(given.threads), "--max-running", str(max(64, given.clients))),
    )
    ready, loaded = [], {}
    for start in range(given.starts):
        server = peers.Running(peers.Peer("rivulet", command, "/ready"), scratch)
        try:
            server.wait(given.patience)
            ready.append(round(server.seconds_to_ready or 0, 3))
            if start == given.starts - 1:
                loaded = asyncio.run(load(server, given))
        finally:
            server.stop()
    return {
        "machine": tables.machine(given.threads),
        "arguments": vars(given),
        "seconds_to_ready": ready,
        **loaded,
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    given, times, memory = report["arguments"], report["cpu_us_per_token"], report["resident_mb"]
    ready = report["seconds_to_ready"]
    shown = Table("", title=f"{given['model']}, {given['kv_cache_tokens']:,} tokens of KV cache")
    shown.add_column("measured", justify="right")
    shown.add_column("goal", justify="right")
    starts = ", ".join(f"{seconds:.2f}" for seconds in ready)
    median = statistics.median(ready)
    for row in (
        ("seconds from process start to /ready", f"{median:.2f} ({starts})", f"< {MOST_SECONDS:g}"),
        ("resident set when ready, MB", f"{memory['ready']:.0f}", ""),
        ("resident set after one full load, MB", f"{memory['after_load']:.0f}", f"< {MOST_MEGABYTES}"),
        ("tokens/s of the CPU run", f"{report['tokens_per_second']:.0f}", ""),
        ("event loop, CPU µs a token", f"{times['event_loop']:.1f}", f"< {MOST_MICROSECONDS}"),
        ("engine thread's Python, CPU µs a token", f"{times['engine_python_estimate']:.1f}", ""),
        ("engine thread in all, CPU µs a token", f"{times['engine_thread']:.1f}", ""),
        ("other threads, CPU µs a token", ", ".join(map(str, times["other_threads"])), ""),
    ):
        shown.add_row(*row)
    console.print(shown)
    console.print(
        f"{given['clients']} streams side by side, {report['tokens']:,} output tokens. Event loop: HTTP, "
        "tokenizing the prompts, detokenizing and events, spread over the output tokens. Engine thread's "
        "Python: what that thread did beyond the busiest of the others, so scheduler, sampling and hand-over "
        f"if the crew shares its work evenly. Load before: {report['machine']['load_before']}.",
    )


def main() -> int:
    """Run it; the exit status is 1 if the server fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder, .gguf file or hub id")
    parser.add_argument("--kv-cache-tokens", type=int, default=8192, help="size of the pool")
    parser.add_argument("--clients", type=int, default=32, help="streams side by side, which fill the pool")
    parser.add_argument("--turns", type=int, default=2, help="requests of each client in the CPU run")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the server")
    parser.add_argument("--starts", type=int, default=3, help="how often it is started")
    parser.add_argument("--patience", type=float, default=120, help="seconds until it must be ready")
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="rivulet-footprint-") as folder:
            report = measure(given, Path(folder))
    except (peers.PeerError, BenchError, Broken, Unreachable) as error:
        print(f"footprint: {error}", file=sys.stderr)
        return 1
    show(report)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
