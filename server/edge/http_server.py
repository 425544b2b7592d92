"""uvicorn in a thread of its own, so that the main thread loads the model and heeds the signals.

It answers from the moment it is started, and keeps answering while it drains: uvicorn itself would close
its sockets first, and a client could not tell a server that ends from one that is not there.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future

import uvicorn
from starlette.applications import Starlette

from server.config import ServeSettings
from server.edge.gate import Gate
from server.edge.listening import EdgeServer
from server.metrics import Metrics

START_SECONDS = 30

HEED_SECONDS = 0.5
"""From a signal until the main thread heeds it, at most."""


class HttpServer(EdgeServer):
    """Serves a gate from `start` to the end of its drain, or to `stop`."""

    def __init__(self, config: uvicorn.Config, settings: ServeSettings, gate: Gate) -> None:
        super().__init__(config, settings)
        self._gate = gate
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._thread: threading.Thread | None = None

    def start(self, listener: socket.socket) -> None:
        """Listen on a bound socket."""
        sockets = {"sockets": [listener]}
        self._thread = threading.Thread(target=self.run, kwargs=sockets, name="rivulet-http", daemon=True)
        self._thread.start()

    def open(self, app: Starlette) -> None:
        """Start an application on the event loop and let requests in."""
        loop = self._loop.result(START_SECONDS)
        metrics: Metrics = app.state.metrics
        metrics.watch_connections(lambda: self.num_connections)
        self.on_refusal = self._gate.on_refusal = metrics.count_rejection
        asyncio.run_coroutine_threadsafe(self._gate.open(app), loop).result()

    def join(self) -> None:
        """Wait for the end."""
        assert self._thread is not None
        while self._thread.is_alive():
            # Python heeds a signal on the main thread only, which one that the system gives to another thread
            # does not wake: as where a process was stopped (SIGSTOP) until just before it is told to end.
            self._thread.join(HEED_SECONDS)

    def stop(self) -> None:
        """End without a drain: what still runs is told an error."""
        self.should_exit = True
        self.join()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """The thread."""
        self._loop.set_result(asyncio.get_running_loop())
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; uvicorn asks ten times a second."""
        return await super().on_tick(counter) or self._gate.drained

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the application before the connections, so that each stream gets its last event."""
        await self._gate.close()
        await super().shutdown(sockets)
