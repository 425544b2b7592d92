"""A live server in this process: uvicorn on a free port, in a thread of its own."""

import threading
import time
from pathlib import Path

import httpx
from rich.console import Console

from server.app import create_app
from server.config import ServeSettings
from server.edge.serving import bind, make_server
from server.engine.engine import EngineStats
from server.phases import Phases
from server.service import Limits
from server.startup import load


class LiveServer:
    """Serves a model as `rivulet serve` does, until `stop`."""

    def __init__(self, model: Path, **settings: object) -> None:
        values = {"model": str(model), "kv_cache_tokens": 16384, "shutdown_timeout": 5} | settings
        self.settings = ServeSettings(**values)
        wanted = self.settings
        limits = Limits(wanted.max_best_of, wanted.max_stop_sequences, wanted.max_top_n_tokens)
        aliases = wanted.served_model_aliases
        self.loaded = load(wanted, None, wanted.max_waiting, Console(quiet=True), Phases(), limits, aliases)
        self.service = self.loaded.service
        socket = bind("127.0.0.1", 0)
        self.port: int = socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = make_server(create_app(self.service, wanted), wanted)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [socket]})
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.01)

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

    def stop(self) -> None:
        """End the server and its threads."""
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
