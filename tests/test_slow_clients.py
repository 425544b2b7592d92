"""Slow and trickling clients, by slowhttptest: nobody else waits for them, and none outlives the deadlines.

The Debian package is installed where that can be; elsewhere the tests skip, and with CI set they fail.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from live import LiveServer
from venvs import CannotInstall, install
from wire import FORMS, num_tasks, wait_for

pytestmark = pytest.mark.alone

SECONDS = 1.0
"""The server's deadlines."""
LASTING = 3
"""Seconds of an attack."""
MODES = {
    "slow heads": (150, ["-H", "-i", "1", "-u", "{url}/health"]),
    "slow bodies": (150, ["-B", "-i", "1", "-f", "application/json", "-s", "8192", "-u", "{url}/generate"]),
    # Each asks for more than the system holds for it, and reads 5 bytes a second of it.
    "slow reads": (
        20,
        ["-X", "-k", "10", "-n", "1", "-z", "5", "-w", "512", "-y", "1024", "-u", "{url}/openapi.json"],
    ),
}
"""How many there are, and what they do."""


@pytest.fixture(scope="module")
def slowhttptest() -> str:
    """The command."""
    found = shutil.which("slowhttptest")
    if found is None:
        try:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                raise CannotInstall("only root can, where there is apt-get")
            package = ["apt-get", "install", "--yes", "--no-install-recommends", "slowhttptest"]
            try:
                install(package)
            except CannotInstall:  # a fresh machine has no lists of packages yet
                install(["apt-get", "update"])
                install(package)
        except CannotInstall as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"slowhttptest cannot be installed here: {error}")
        found = shutil.which("slowhttptest")
    assert found
    return found


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[LiveServer]:
    times = dict.fromkeys(("header_timeout", "body_timeout", "idle_timeout", "send_timeout"), SECONDS)
    server = LiveServer(tiny_folder, dtype="float32", **times)
    yield server
    server.stop()


def calls(server: LiveServer, goes_on: Callable[[], bool]) -> list[float]:
    """A good client's calls, one after another on connections of their own: their seconds."""
    waits = []
    while goes_on():
        started = time.perf_counter()
        with server.client() as client:
            form = FORMS[len(waits) % 2]
            assert form.text(client.post(form.path, json=form.body("good", 10))) != ""
        waits.append(time.perf_counter() - started)
    return waits


def held(server: LiveServer) -> dict[str, int]:
    """What an attack could leave behind."""
    return {
        "connections": len(server._server.server_state.connections),
        "tasks": num_tasks(server),
        "files": len(os.listdir("/proc/self/fd")),
        "blocks": server.stats.blocks_used,
    }


@pytest.mark.parametrize(("attackers", "mode"), MODES.values(), ids=MODES.keys())
def test_slow_clients_change_nobodys_latency(
    slowhttptest: str, server: LiveServer, tmp_path: Path, attackers: int, mode: list[str]
) -> None:
    alone = calls(server, iter([True] * 20 + [False]).__next__)
    server.wait_until_idle()
    wait_for(lambda: held(server)["connections"] == 0)
    before = held(server)
    size = ["-c", str(attackers), "-r", str(attackers), "-l", str(LASTING), "-p", "1"]
    command = [slowhttptest, *size, *(part.format(url=server.url) for part in mode)]
    seen: list[int] = []
    with (tmp_path / "said").open("w") as said:
        attack = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=tmp_path)
        try:

            def lasts() -> bool:
                seen.append(held(server)["connections"])
                return attack.poll() is None

            during = calls(server, lasts)
            # They all came, and none was there for longer than its deadline.
            assert max(seen) > attackers // 2
            wait_for(lambda: held(server)["connections"] == 0, 3 * SECONDS)
        finally:
            attack.kill()
            attack.wait()
    # The median: on a busy machine single calls are late anyhow, a server that is held up is late every time.
    assert statistics.median(during) < 5 * statistics.median(alone) + 0.05
    wait_for(lambda: held(server) == before)
    with server.client() as client:
        assert client.get("/health").status_code == httpx.codes.OK
