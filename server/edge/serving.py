"""The HTTP server around a gate: uvicorn with our socket, protocol and deadlines."""

import socket

import uvicorn

from server.config import ServeSettings
from server.edge.gate import Gate
from server.edge.http_server import HttpServer
from server.edge.identity import CallerMiddleware
from server.edge.turnstile import Turnstile


def make_server(gate: Gate, settings: ServeSettings) -> HttpServer:
    """A server that is not running yet; give `start` the socket of `bind`."""
    config = uvicorn.Config(
        CallerMiddleware(Turnstile(gate), settings.log_prompts),
        http="h11",  # what EdgeProtocol builds on
        ws="none",
        lifespan="off",  # the gate opens and closes the application itself
        log_config=None,
        server_header=False,
        proxy_headers=False,  # who may call us may write them, and be counted as whoever it likes
        access_log=False,  # ours has one line a request at its end, and never a query
        timeout_graceful_shutdown=1,  # the gate has drained by then
    )
    return HttpServer(config, settings, gate)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening (OSError if it cannot be had)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Where the protocol is named asyncio switches Nagle's algorithm off, which would hold events back.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
