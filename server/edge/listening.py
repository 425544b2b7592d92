"""A uvicorn server that listens with our protocol, deadlines and TLS; knows nothing of what it serves."""

import asyncio
import socket
import ssl
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from server.config import ServeSettings
from server.edge.protocol import EdgeProtocol
from server.edge.turns import Turns
from server.errors import Kind

SEND_BUFFER = 131_072
"""Bytes that the system holds for one connection (Linux doubles it). Left to itself it goes up to megabytes:
clients that do not read would fill them, and that nobody reads would be seen late."""


class EdgeServer(uvicorn.Server):
    """Uvicorn's server, whose connections are EdgeProtocols."""

    def __init__(self, config: uvicorn.Config, settings: ServeSettings) -> None:
        super().__init__(config)
        self._settings = settings
        self.on_refusal: Callable[[Kind], None] = lambda kind: None
        """Told of what is refused before it comes to the application."""

    @property
    def num_connections(self) -> int:
        """Open ones."""
        return len(self.server_state.connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and listen (SystemExit if the application fails)."""
        assert sockets, "bind() makes them"
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self.servers = [await self._listen(listener) for listener in sockets]
        self.started = True

    async def _listen(self, listener: socket.socket) -> asyncio.Server:
        """Accept connections, for each of which holds what is set on the listener."""
        settings = self._settings
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # sees what the system holds and nobody takes; we cannot
            milliseconds = int(settings.send_timeout * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        protocol = partial(
            EdgeProtocol,
            settings,
            lambda kind: self.on_refusal(kind),
            Turns(),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        tls: dict[str, Any] = {}
        if settings.tls_certificate is not None:
            tls = {
                "ssl": tls_context(settings),
                "ssl_handshake_timeout": settings.header_timeout,
                "ssl_shutdown_timeout": settings.send_timeout,
            }
        loop = asyncio.get_running_loop()
        return await loop.create_server(protocol, sock=listener, backlog=self.config.backlog, **tls)


def tls_context(settings: ServeSettings) -> ssl.SSLContext:
    """What the settings' certificate and key give, which were seen to fit when they were parsed."""
    assert settings.tls_certificate is not None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    return context
