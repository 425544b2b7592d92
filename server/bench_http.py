"""One HTTP/1.1 request a connection on asyncio's streams: the body comes as pieces with their times.

Speaks http and https, bodies in chunks, of a known length and up to the close. Follows no redirect, keeps no
connection and knows nothing of what the bodies say: a piece costs a read, a clock and a scan for its chunk.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

READ_BYTES = 1 << 18
MOST_HEAD_BYTES = 1 << 16
PORTS = {"http": 80, "https": 443}


class Unreachable(Exception):
    """Nobody takes a connection at the address."""


class Broken(Exception):
    """A connection or an answer that went wrong, as a few words."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to send."""

    host: str
    port: int
    path: str
    """What stands before every path; without a slash at its end."""
    tls: ssl.SSLContext | None

    @classmethod
    def parse(cls, url: str) -> "Address":
        """From a URL that begins with http:// or https:// (Broken)."""
        try:
            parts = urlsplit(url)
            if not parts.hostname:
                raise ValueError("it names no host")
            parts.hostname.encode("idna")
            parts.path.encode("ascii")
            port = PORTS[parts.scheme] if parts.port is None else parts.port
        except ValueError as error:
            raise Broken(f"no address: {error}") from None
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return cls(parts.hostname, port, parts.path.rstrip("/"), tls)

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode()
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Response:
    """All that came, as it came; times in seconds of `time.perf_counter`."""

    started: float
    """Before the connection was opened."""
    status: int
    reason: str
    pieces: Sequence[tuple[float, bytes]]
    """Of the body, without the marks of its chunks."""

    @property
    def success(self) -> bool:
        """Whether the status says so."""
        return 200 <= self.status < 300

    @property
    def body(self) -> bytes:
        """The whole of it."""
        return b"".join(piece for _, piece in self.pieces)


async def exchange(address: Address, method: str, path: str, content: Any = None) -> Response:
    """Send one request, with `content` as JSON, and read its answer to the end (Unreachable, Broken)."""
    body = b"" if content is None else json.dumps(content).encode()
    request = (
        f"{method} {address.path}{path} HTTP/1.1\r\nHost: {address.authority}\r\nConnection: close\r\n"
        "Accept: text/event-stream, application/json\r\nAccept-Encoding: identity\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=address.tls, limit=MOST_HEAD_BYTES
        )
    except ssl.SSLError as error:
        raise Broken(str(error)) from None
    except OSError as error:
        raise Unreachable(str(error)) from None
    try:
        writer.write(request.encode() + body)
        status, reason, headers = await _head(reader)
        frame = _Frame(headers)
        pieces = []
        while not frame.complete:
            data = await reader.read(READ_BYTES)
            arrived = time.perf_counter()
            if not data:
                frame.close()
            elif payload := frame.take(data):
                pieces.append((arrived, payload))
        return Response(started, status, reason, pieces)
    except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
        raise Broken(_words(error)) from None
    finally:
        writer.close()


def _words(error: Exception) -> str:
    match error:
        case asyncio.IncompleteReadError(partial=b""):
            return "the server closed the connection without an answer"
        case EOFError():
            return "the server closed the connection in the middle of an answer"
        case asyncio.LimitOverrunError():
            return f"the head of the answer is longer than {MOST_HEAD_BYTES:,} bytes"
    return str(error) or type(error).__name__


async def _head(reader: asyncio.StreamReader) -> tuple[int, str, Mapping[str, str]]:
    """Status, its words, and the headers by their names in lower case; interim answers are passed over."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip("\r\n").split("\r\n")
        protocol, _, rest = first.partition(" ")
        status, _, reason = rest.partition(" ")
        if not protocol.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal():
            raise ValueError(f"the answer is no HTTP/1.1: {first[:80]!r}")
        if not status.startswith("1"):
            break
    fields = (line.partition(":") for line in lines)
    return int(status), reason, {name.strip().lower(): value.strip() for name, _, value in fields}


def _size(digits: str | bytes, base: int) -> int:
    size = int(digits, base)
    if size < 0:
        raise ValueError(f"the answer has a part of {size} bytes")
    return size


class _Frame:
    """What of an answer's bytes is its body, and where that ends; bytes may come cut anywhere."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length")
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._left = None if self._chunked or length is None else _size(length, 10)
        """Bytes to come, of the whole or of a chunk; None if that is not known (yet)."""
        self._rest = b""
        """The beginning of a chunk's mark whose end is to come."""
        self._trailing = False
        self.complete = self._left == 0

    def take(self, data: bytes) -> bytes:
        """The body's part of the next bytes (ValueError for a mark that is none)."""
        if self._chunked:
            return self._take_chunks(data)
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
            self.complete = self._left == 0
        return data

    def _take_chunks(self, data: bytes) -> bytes:
        if self._rest:
            data = self._rest + data
        parts, at = [], 0
        while at < len(data):
            if self._left:
                parts.append(data[at : at + self._left])
                at += len(parts[-1])
                self._left -= len(parts[-1])
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            mark, at = data[at:end], end + 2
            if self._trailing:
                self.complete = self.complete or not mark
            elif mark:  # else it is the end of the chunk's own line
                self._left = _size(mark.partition(b";")[0], 16)
                self._trailing = self._left == 0
        self._rest = data[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Take note that nothing more comes (EOFError if more should)."""
        if self._chunked or self._left is not None:
            raise EOFError
        self.complete = True
