"""What must hold all the time, from outside: /metrics every second, /health from another process."""

import asyncio
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from soak.fates import Faults, Ledger
from soak.prober import INTERVAL
from soak.raw import Address

Samples = dict[str, float]

PAUSES = frozenset({"process paused", "no descriptors", "crowd of connections"})
"""Faults under which nobody can answer: the time of /health does not count then."""


def read_metrics(text: str) -> tuple[Samples, set[str]]:
    """Every sample by name and labels, and which of them may never fall."""
    samples: Samples = {}
    rising: set[str] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = f"{sample.name}{sorted(sample.labels.items())}"
            samples[name] = sample.value
            if family.type in ("counter", "histogram") and not sample.name.endswith("_created"):
                rising.add(name)
    return samples, rising


def calls_without_end(samples: Samples) -> float:
    """Calls that came and neither succeeded nor failed, by the server's own count."""
    failures = (value for name, value in samples.items() if name.startswith("tgi_request_failure_total["))
    return samples["tgi_request_count_total[]"] - samples["tgi_request_success_total[]"] - sum(failures)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the server was started with."""

    max_running: int
    max_waiting: int


class Invariants:
    """Compares each picture of the metrics with the bounds and with the one before."""

    def __init__(self, bounds: Bounds, ledger: Ledger) -> None:
        self._bounds = bounds
        self._ledger = ledger
        self._last: Samples = {}
        self.pictures = 0
        self.running = self.most_running = 0
        self.waiting = self.most_waiting = 0

    def check(self, text: str) -> Samples:
        """Take a picture in; whatever does not hold is told to the ledger."""
        samples, rising = read_metrics(text)
        running, waiting = samples["rivulet_requests_running[]"], samples["rivulet_requests_waiting[]"]
        used, total = samples["rivulet_cache_blocks_used[]"], samples["rivulet_cache_blocks_total[]"]
        self.pictures += 1
        self.running, self.waiting = int(running), int(waiting)
        self.most_running = max(self.most_running, self.running)
        self.most_waiting = max(self.most_waiting, self.waiting)
        if running > self._bounds.max_running:
            self._ledger.blame(f"{running:.0f} requests run, {self._bounds.max_running} may")
        if running + waiting > self._bounds.max_running + self._bounds.max_waiting:
            self._ledger.blame(f"{waiting:.0f} requests wait beside {running:.0f} that run")
        if used > total:
            self._ledger.blame(f"{used:.0f} cache blocks of {total:.0f} are in use")
        for name in rising:
            if samples[name] < self._last.get(name, 0):
                self._ledger.blame(f"the counter {name} fell")
        self._last = samples
        return samples


async def poll(http: httpx.AsyncClient, invariants: Invariants, faults: Faults) -> None:
    """Check a picture a second, for ever."""
    while True:
        began = time.monotonic()
        try:
            answer = await http.get("/metrics")
        except httpx.TransportError as error:
            faults.excuse_connection(error, began)
        else:
            if answer.status_code == 200:
                invariants.check(answer.text)
            else:
                faults.excuse_connection(ConnectionError(f"/metrics answers {answer.status_code}"), began)
        await asyncio.sleep(1)


class Health:
    """How fast /health answers, from `start` to `stop`."""

    def __init__(self, address: Address) -> None:
        path = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "soak.prober", address.host, str(address.port)],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self, faults: Faults) -> tuple[list[float], set[int]]:
        """Seconds of each answer that no fault kept the server from giving; statuses other than 200.

        The next question waits for the answer before it: those that fell out count as late as they were.
        """
        out, _ = self._process.communicate(timeout=60)
        seconds, statuses = [], set()
        for line in out.splitlines():
            began, took, status = line.split()
            if not _overlaps(faults, float(began), float(began) + float(took)):
                seconds += unhidden(float(took))
                statuses.add(int(status))
        return seconds, statuses - {200}


def unhidden(took: float) -> list[float]:
    """An answer's time, and those of the questions that were not asked because it took so long."""
    return [took - late * INTERVAL for late in range(max(1, math.ceil(took / INTERVAL)))]


def _overlaps(faults: Faults, began: float, ended: float) -> bool:
    return any(
        fault.name in PAUSES and began <= fault.ended and ended >= fault.began for fault in faults.done
    )
