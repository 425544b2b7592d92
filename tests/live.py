"""A live server in this process: uvicorn on a free port, in a thread of its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from model.batch import Batch, StepResult
from server.app import create_app
from server.config import ServeSettings
from server.edge.gate import Gate
from server.edge.lifecycle import Lifecycle
from server.edge.serving import bind, make_server
from server.engine.records import EngineStats
from server.phases import Phases
from server.service import Limits
from server.startup import load


class LiveServer:
    """Serves a model as `rivulet serve` does, until `stop`."""

    def __init__(self, model: Path, **settings: object) -> None:
        values = {"model": str(model), "kv_cache_tokens": 16384, "shutdown_timeout": 5} | settings
        self.settings = ServeSettings(**values)
        wanted = self.settings
        names = (None, wanted.served_model_aliases, wanted.lora)
        phases = Phases()
        self.lifecycle = Lifecycle(phases)
        given = (wanted, Console(quiet=True), phases, Limits.of(wanted))
        self.loaded = load(*given, *names, on_fault=self.lifecycle.fail)
        self.service = self.loaded.service
        socket = bind("127.0.0.1", 0)
        self.port: int = socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = make_server(Gate(self.lifecycle), wanted)
        self._server.start(socket)
        self._server.open(create_app(self.service, wanted, self.lifecycle))

    @property
    def name(self) -> str:
        """The served model's name."""
        return self.service.model.name

    @property
    def stats(self) -> EngineStats:
        """What the engine is doing."""
        return self.service.engine.stats

    def client(self, **options: object) -> httpx.Client:
        """A client of this server."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Wait for every block to come back (AssertionError if they do not)."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.stats
            busy = stats.running + stats.waiting + stats.blocks_used + self.service.engine.num_requests
            if busy == 0:
                return
            assert time.monotonic() < deadline, f"still busy: {stats}"
            time.sleep(0.01)

    @contextmanager
    def slowed(self, seconds: float) -> Iterator[None]:
        """Each step takes so much longer, so that what a test looks for is not over before it looks."""
        runner = self.service.engine._runner
        execute = runner.execute

        def slow(batch: Batch) -> StepResult:
            time.sleep(seconds)
            return execute(batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "execute", slow)
            yield

    def stop(self) -> None:
        """End the server and its threads."""
        self._server.stop()
