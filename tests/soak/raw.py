"""Bare connections, for clients that a library would not let be so rude."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from soak.dialects import Body

MOST_HEAD = 1 << 18


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and the keys that open it."""

    host: str
    port: int
    key: str
    quiet_key: str
    """Of a client that never asks for two things at once, whom the others must not shut out."""

    @property
    def url(self) -> str:
        """Of the server, without a path."""
        return f"http://{self.host}:{self.port}"

    def head(self, method: str, path: str, *lines: str, key: str | None = None) -> bytes:
        """A request's head up to its blank line."""
        key = self.key if key is None else key
        first = f"{method} {path} HTTP/1.1"
        fields = ("Host: soak", f"Authorization: Bearer {key}", "Content-Type: application/json", *lines)
        return "\r\n".join((first, *fields, "", "")).encode()

    def post(self, path: str, body: Body) -> bytes:
        """A whole request, after whose answer the server closes."""
        content = json.dumps(body).encode()
        return self.head("POST", path, f"Content-Length: {len(content)}", "Connection: close") + content


def unchunk(body: bytes) -> tuple[bytes, bool]:
    """What the chunks of a body carry, and whether the last of them came."""
    parts = []
    while True:
        mark, found, body = body.partition(b"\r\n")
        size = int(mark, 16) if found else 0
        if size == 0 or len(body) < size + 2:
            return b"".join(parts), bool(found) and size == 0
        parts.append(body[:size])
        body = body[size + 2 :]


@dataclass(slots=True)
class Connection:
    """One connection; closed with the block that opened it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send (OSError once the server has closed)."""
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> int | None:
        """The status of the answer; None if the server closed instead."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await self.reader.readuntil(b"\r\n\r\n")
            return int(head.split(b" ", 2)[1])
        return None

    async def rest(self) -> bytes:
        """Everything up to the server's end of the connection."""
        with contextlib.suppress(OSError):
            return await self.reader.read()
        return b""

    def reset(self) -> None:
        """Leave without a word: RST."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def connect(address: Address, receive_buffer: int | None = None) -> AsyncIterator[Connection]:
    """Open a connection (OSError); a small receive buffer makes the server feel a reader that stops."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
        limit = MOST_HEAD if receive_buffer is None else receive_buffer
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
    except BaseException:
        sock.close()
        raise
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
