"""`rivulet serve` as a process of its own: started, read, waited for, and gone with all that it started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from wire import wait_for

RIVULET = Path(sys.executable).with_name("rivulet")


def environment(**variables: str) -> dict[str, str]:
    """The environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RIVULET_")} | variables


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """`rivulet serve` as a process of its own, from its first moment."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        self.process = subprocess.Popen(
            [RIVULET, "serve", *arguments],
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.screen = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.screen += line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it started and left
        self.end()

    def end(self) -> int:
        """Wait for the process and give its exit status."""
        status = self.process.wait(60)
        self._reader.join()
        return status

    def listening(self) -> list[str]:
        """The addresses that the process listens on, as /proc/net/tcp writes them."""
        folder = Path(f"/proc/{self.process.pid}")
        links = []
        for link in (folder / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(link))
        inodes = {found[1] for link in links if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}
        rows = [
            row.split()
            for table in ("tcp", "tcp6")
            for row in (folder / "net" / table).read_text().splitlines()[1:]
        ]
        return [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]


class Serving(Process):
    """The same once it has said where it serves."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        super().__init__(*arguments, **variables)
        wait_for(lambda: "/generate" in self.screen or self.process.poll() is not None, 60)
        found = re.search(r"on (http://\S+)", self.screen)
        assert found, self.screen
        self.url = found[1]


def gone(session: int) -> bool:
    """Whether no process of a session is left."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return False
    return True
