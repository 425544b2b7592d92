"""From the results of all servers to one table: medians over rounds, ratios, and the machine beside them."""

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import OURS, PLAIN
from rich.console import Console
from rich.table import Table

FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a load; `goal` is for the ratio of ours to the best peer's."""

    load: str
    name: str
    path: tuple[str, ...]
    more_is_better: bool
    goal: float | None = None

    def of(self, results: Sequence[dict[str, Any]]) -> list[float]:
        """Its value in each round, where it has one."""
        values = []
        for result in results:
            value: Any = result
            for key in self.path:
                value = value[key] if value is not None else None
            if value is not None:
                values.append(value)
        return values


GOALS = {
    ("1 client, 128 in", "decode tok/s a client"): 3.5,
    ("8 clients, 128 in", "tokens/s in all"): 4.0,
    ("32 clients, 128 in", "tokens/s in all"): 2.5,
    ("32 clients, 128 in", "TTFT p50, ms"): 0.6,
    ("1 client, 512 in", "TTFT p50, ms"): 0.6,
}
KINDS = (
    ("tokens/s in all", ("tokens_per_second",), True),
    ("decode tok/s a client", ("decode_tokens_per_second",), True),
    ("TTFT p50, ms", ("ttft_ms", "p50"), False),
    ("TTFT p99, ms", ("ttft_ms", "p99"), False),
    ("gap p50, ms", ("gap_ms", "p50"), False),
    ("gap p99, ms", ("gap_ms", "p99"), False),
)


def compare(results: dict[str, Any], loads: Sequence[str]) -> list[dict[str, Any]]:
    """Each figure of each load: every server's median and extremes, and the ratio of ours to the best peer's.

    The ratio is that of the medians.
    """
    rows = []
    for load in loads:
        for name, path, more in KINDS:
            figure = Figure(load, name, path, more, GOALS.get((load, name)))
            rounds = {server: figure.of(entry["loads"].get(load, [])) for server, entry in results.items()}
            values = {server: statistics.median(each) for server, each in rounds.items() if each}
            spreads = {server: [min(each), max(each)] for server, each in rounds.items() if each}
            others = [value for server, value in values.items() if server not in (OURS, PLAIN)]
            best = (max if more else min)(others) if others else None
            ratio = round(values[OURS] / best, 3) if best and OURS in values else None
            rows.append(asdict(figure) | {"values": values, "spreads": spreads, "ratio": ratio})
    return rows


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((told.get("flags") or told.get("Features") or "").split())
    return {
        "processor": told.get("model name", platform.machine()),
        "model": "/".join(told.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
    }


def show(report: dict[str, Any]) -> None:
    """Print the machine and the table."""
    facts, results = report["machine"], report["servers"]
    console = Console(width=None if sys.stdout.isatty() else 90 + 26 * len(results))
    console.print(
        f"{facts['processor']} (family/model/stepping {facts['model']}), {facts['cores']} cores, "
        f"{facts['memory_gib']} GiB, {' '.join(facts['flags'])}; load before: {facts['load_before']}",
        highlight=False,
        soft_wrap=True,
    )
    shown = Table("load", "figure", title="medians (smallest to largest round)", title_justify="left")
    for name in (*results, "ours / best peer", "goal"):
        shown.add_column(name, justify="right")
    for name, key in (("seconds to ready", "seconds_to_ready"), ("peak memory, MB", "peak_memory_mb")):
        shown.add_row("", name, *(str(entry.get(key, "-")) for entry in results.values()), "", "")
    last = ""
    for row in report["figures"]:
        if row["load"] != last:
            shown.add_section()
        values = (_cell(row, name) for name in results)
        ratio, goal = row["ratio"], row["goal"]
        sign = ">=" if row["more_is_better"] else "<="
        met = goal is None or ratio is None or (ratio >= goal) == row["more_is_better"]
        ratio_text = "-" if ratio is None else f"[bold]{ratio:.2f}[/bold]{'' if met else ' !'}"
        shown.add_row(
            row["load"] if row["load"] != last else "",
            row["name"],
            *values,
            ratio_text,
            "" if goal is None else f"{sign} {goal}",
        )
        last = row["load"]
    console.print(shown)
    for name, entry in results.items():
        for text in (entry["note"], entry.get("failed") and f"failed: {entry['failed']}"):
            if text:
                console.print(f"{name}: {text}", highlight=False, soft_wrap=True, markup=False)
    for name, why in report["absent"].items():
        console.print(f"{name}: {why}", highlight=False, soft_wrap=True, markup=False)


def _cell(row: dict[str, Any], server: str) -> str:
    """The median, and the extremes if rounds differ."""
    if server not in row["values"]:
        return "-"
    low, high = row["spreads"][server]
    return f"{row['values'][server]:,.1f}" + (f" ({low:,.1f} to {high:,.1f})" if low < high else "")
