"""What a soak found: tables for people, one JSON object for programs; pure functions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soak.fates import Fate, Fault, Ledger
from soak.process import Holdings

MIB = 1 << 20
GROWTH = 48 * MIB
"""Bytes that the server may grow by after its warm-up: allocators keep what the busiest moment took."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured."""

    seconds: float
    seed: int
    model: str
    ledger: Ledger
    faults: Sequence[Fault]
    before: Holdings
    """Idle, after the warm-up."""
    after: Holdings
    """Idle, at the end."""
    left: dict[str, float]
    """Of the metrics, once all clients have gone: each must be zero."""
    health: Sequence[float]
    """Seconds that each of its answers took."""
    health_bound: float
    """Seconds within which 99 of 100 must come; 0 if that is not judged."""
    pictures: int
    most_running: int
    most_waiting: int
    exit_status: int | None
    exit_seconds: float

    @property
    def leaks(self) -> dict[str, float]:
        """What is more than at the start; all zero if nothing leaks."""
        held = {
            name: max(0, getattr(self.after, name) - getattr(self.before, name))
            for name in ("descriptors", "threads", "tasks")
        }
        return self.left | held

    @property
    def survived(self) -> Counter[str]:
        """Faults after which the known answer came again."""
        last = max(self.ledger.canaries, default=0.0)
        return Counter(fault.name for fault in self.faults if fault.ended < last)

    @property
    def injected(self) -> Counter[str]:
        """All faults."""
        return Counter(fault.name for fault in self.faults)

    @property
    def health_p99(self) -> float:
        """Seconds."""
        ordered = sorted(self.health)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else float("inf")

    @property
    def broken(self) -> list[str]:
        """Every promise that was broken, as sentences."""
        sentences = list(self.ledger.wrongs)
        sentences += [f"{number:.0f} {name} leaked" for name, number in self.leaks.items() if number]
        grown = self.after.resident - self.before.resident
        if grown > GROWTH:
            sentences.append(f"the server grew by {grown / MIB:.0f} MiB")
        if self.health_bound and self.health_p99 > self.health_bound:
            sentences.append(f"/health took {1000 * self.health_p99:.0f} ms in the 99th of 100 cases")
        for name, number in (self.injected - self.survived).items():
            sentences.append(f"{number} of the faults {name!r} came without a good answer after them")
        if self.exit_status != 0:
            sentences.append(f"the server ended with status {self.exit_status}")
        return sentences


def tables(found: Findings) -> list[Table]:
    """Requests by fate, faults, leaks and memory."""
    fates = [fate for fate in Fate if found.ledger.by_fate(fate)]
    requests = Table(
        "client", *(fate.value for fate in fates), title="requests by fate", title_justify="left"
    )
    for kind in sorted({kind for kind, _ in found.ledger.ends}):
        requests.add_row(kind, *(_count(found.ledger.ends[kind, fate]) for fate in fates))
    requests.add_section()
    requests.add_row("all", *(_count(found.ledger.by_fate(fate)) for fate in fates))

    faults = Table("fault", "injected", "survived", title="faults", title_justify="left")
    for name, number in sorted(found.injected.items()):
        faults.add_row(name, str(number), str(found.survived[name]))

    leaks = Table("what", "leaked", title="leaks, once idle", title_justify="left")
    for name, leaked in found.leaks.items():
        leaks.add_row(name, f"{leaked:.0f}")

    held = Table("", "after the warm-up", "at the end", title="the process", title_justify="left")
    for name, before in asdict(found.before).items():
        after = getattr(found.after, name)
        is_memory = name == "resident"
        texts = (f"{number / MIB:.1f} MiB" if is_memory else str(number) for number in (before, after))
        held.add_row("memory" if is_memory else name, *texts)
    return [requests, faults, leaks, held]


def figures(found: Findings) -> dict[str, Any]:
    """The same as JSON has it."""
    return {
        "seconds": round(found.seconds, 1),
        "seed": found.seed,
        "model": found.model,
        "requests": found.ledger.requests,
        "fates": {fate.name.lower(): found.ledger.by_fate(fate) for fate in Fate},
        "faults": {"injected": dict(found.injected), "survived": dict(found.survived)},
        "leaks": found.leaks,
        "before": asdict(found.before),
        "after": asdict(found.after),
        "health_p99_ms": round(1000 * found.health_p99, 1),
        "health_max_ms": round(1000 * max(found.health, default=0.0), 1),
        "most_running": found.most_running,
        "most_waiting": found.most_waiting,
        "pictures": found.pictures,
        "exit_status": found.exit_status,
        "exit_seconds": round(found.exit_seconds, 1),
        "broken": found.broken,
    }


def show(found: Findings, console: Console) -> None:
    """Print everything but the JSON."""
    for table in tables(found):
        console.print(table)
    console.print(
        f"/health in {1000 * found.health_p99:.1f} ms (p99 of {len(found.health):,}); "
        f"at most {found.most_running} running and {found.most_waiting} waiting in {found.pictures} looks; "
        f"with streams running it ended in {found.exit_seconds:.1f} s, status {found.exit_status}"
    )
    counts = Counter(found.broken)
    for sentence, number in counts.items():
        console.print(f"[bold red]broken[/] {number} x {escape(sentence)}", highlight=False, soft_wrap=True)
    if not counts:
        console.print("[bold green]every promise held[/]")


def _count(number: int) -> str:
    return f"{number:,}" if number else ""
