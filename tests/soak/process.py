"""The server as a process: how it is started, what /proc says of it, and how it ends."""

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from soak.fates import Fault, Wrong
from soak.raw import Address

START_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds."""

    descriptors: int
    threads: int
    tasks: int
    resident: int
    """Bytes."""


class Server:
    """One `rivulet serve`, with the launcher's saboteur in it if faults are wanted."""

    def __init__(self, folder: Path, seed: int, fault_seconds: float, arguments: list[str]) -> None:
        self._journal = folder / "journal"
        self._journal.touch()
        self._sabotaged = fault_seconds > 0
        keys = [secrets.token_urlsafe(16) for _ in range(2)]
        command = [sys.executable, "-m", "soak.launch", str(self._journal), str(seed), str(fault_seconds)]
        root = Path(__file__).parents[2]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RIVULET_")}
        path = os.pathsep.join((str(root / "tests"), str(root)))
        self.process = subprocess.Popen(
            [*command, "serve", "--host", "127.0.0.1", "--port", "0", *arguments],
            env=variables | {"RIVULET_API_KEYS": ",".join(keys), "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.screen: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.address = Address("127.0.0.1", self._find_port(), *keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.screen.append(line)

    def _find_port(self) -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"on http://[\d.]+:(\d+)", "".join(self.screen)):
                return int(found[1])
            time.sleep(0.05)
        self.__exit__()
        raise Wrong(f"the server did not start: {''.join(self.screen)[-2000:]}")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def faults(self) -> list[Fault]:
        """What the saboteur did, in order."""
        lines = self._journal.read_text().splitlines()
        parts = [line.split(" ", 2) for line in lines if line.startswith("fault ")]
        return [Fault(name, float(began), float(began)) for _, began, name in parts]

    def spare(self) -> None:
        """From now on the saboteur rests."""
        if self._sabotaged:
            self.process.send_signal(signal.SIGUSR2)

    def holdings(self) -> Holdings:
        """What the process holds now."""
        folder = Path(f"/proc/{self.process.pid}")
        pages = int((folder / "statm").read_text().split()[1])
        return Holdings(
            descriptors=len(os.listdir(folder / "fd")),
            threads=len(os.listdir(folder / "task")),
            tasks=self._count_tasks(),
            resident=pages * resource.getpagesize(),
        )

    def _count_tasks(self) -> int:
        """Tasks of the event loop, by way of the launcher."""
        before = self._journal.read_text().count("tasks ")
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            counts = re.findall(r"^tasks (\d+)$", self._journal.read_text(), re.MULTILINE)
            if len(counts) > before:
                return int(counts[-1])
            time.sleep(0.01)
        raise Wrong("the process heeds no signal")
