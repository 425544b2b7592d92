"""One HTTP/1.1 request a connection: the body comes as pieces with their times.

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

READ_BYTES = 1 << 16
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
    answer = _Answer(request.encode() + body)
    started = time.perf_counter()
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_connection(
            lambda: answer, address.host, address.port, ssl=address.tls
        )
    except ssl.SSLError as error:
        raise Broken(str(error)) from None
    except OSError as error:
        raise Unreachable(str(error)) from None
    try:
        status, reason = await answer.whole
        return Response(started, status, reason, answer.pieces)
    except (OSError, EOFError, ValueError) as error:
        raise Broken(str(error) or type(error).__name__) from None
    finally:
        transport.close()


class _Answer(asyncio.BufferedProtocol):
    """Sends a request, and keeps what comes with its time.

    The stream reader of asyncio does that at several times the cost, which is the measured server's loss.
    """

    def __init__(self, request: bytes) -> None:
        self.whole: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        """Status and its words, once the answer is complete."""
        self.pieces: list[tuple[float, bytes]] = []
        self._request = request
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._head = b""
        self._status = (0, "")
        self._frame: _Frame | None = None  # once the head is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Some came."""
        arrived = time.perf_counter()
        data = bytes(self._buffer[:nbytes])
        if self.whole.done():
            return
        try:
            if self._frame is None:
                data = self._read_head(data)
            if self._frame is not None:
                if payload := self._frame.take(data):
                    self.pieces.append((arrived, payload))
                if self._frame.complete:
                    self.whole.set_result(self._status)
        except ValueError as error:
            self.whole.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        if self.whole.done():
            return
        if exc is None and self._frame is not None and self._frame.ends_with_the_connection:
            self.whole.set_result(self._status)
        elif exc is not None:
            self.whole.set_exception(exc)
        elif self._head or self._frame is not None:
            self.whole.set_exception(EOFError("the server closed the connection in the middle of an answer"))
        else:
            self.whole.set_exception(EOFError("the server closed the connection without an answer"))

    def _read_head(self, data: bytes) -> bytes:
        """Status and frame from the head, once it is whole; gives what came behind it (ValueError)."""
        self._head += data
        while self._frame is None:
            head, end, rest = self._head.partition(b"\r\n\r\n")
            if len(head) > MOST_HEAD_BYTES:
                raise ValueError(f"the head of the answer is longer than {MOST_HEAD_BYTES:,} bytes")
            if not end:
                return b""
            self._head = rest
            status, reason, headers = _parse(head.decode("latin-1"))
            if status >= 200:  # interim answers are passed over
                self._status, self._frame = (status, reason), _Frame(headers)
        return rest


def _parse(head: str) -> tuple[int, str, Mapping[str, str]]:
    """Status, its words, and the headers by their names in lower case (ValueError)."""
    first, *lines = head.split("\r\n")
    protocol, _, rest = first.partition(" ")
    status, _, reason = rest.partition(" ")
    if not protocol.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal():
        raise ValueError(f"the answer is no HTTP/1.1: {first[:80]!r}")
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

    @property
    def ends_with_the_connection(self) -> bool:
        """Whether nothing else says where the body ends."""
        return not self._chunked and self._left is None

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
