"""The HTTP server around an application: uvicorn with our socket, protocol and deadlines."""

import socket

import uvicorn
from starlette.types import ASGIApp

from server.config import ServeSettings


def make_server(app: ASGIApp, settings: ServeSettings) -> uvicorn.Server:
    """A server that is not running yet; give `run` the socket of `bind`."""
    config = uvicorn.Config(
        app,
        http="h11",  # bounds the size of headers, which httptools does not
        ws="none",
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_timeout),
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening (OSError if it cannot be had)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Where the protocol is named asyncio switches Nagle's algorithm off, which would hold events back.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener
