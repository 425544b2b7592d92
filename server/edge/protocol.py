"""The server's end of one connection: uvicorn's HTTP/1.1 on h11, with bounds and with deadlines.

A client owes in turn a whole head, a whole body, and the reading of what it is sent. Who is late hears 408
where nothing was answered yet, and the connection ends. Per token run only `BoundedConnection.send` and
gathering.py.
"""

import asyncio
import sys
from collections.abc import Callable
from contextvars import Context
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.config import ServeSettings
from server.edge.gathering import GatheringTransport
from server.edge.turns import Turns
from server.errors import (
    CROWDED,
    LATE,
    MALFORMED,
    TOO_LARGE,
    TOO_LONG_HEAD,
    Kind,
    RequestError,
    error_response,
)

MAX_HEAD_BYTES = 65_536
MAX_FIELDS = 100
MAX_PIECES = 16_384
"""Of one body: each costs the event loop some microseconds, however small it is."""
MAX_UNSENT_BYTES = 65_536
"""Of one connection beside what the system holds; above it the application waits for the client."""


class BoundedConnection(h11.Connection):
    """h11's state of one connection, which bounds each request and takes none that reads in two ways."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)  # bounds what is not complete yet
        self._pieces = 0
        self._chunked = False  # the answer's body

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What the client said next (h11.RemoteProtocolError with the status to answer)."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = 0
            _check_head(event)
        elif isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > MAX_PIECES:
                raise h11.RemoteProtocolError("too many pieces", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return event

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # which has overloads
        """What goes over the wire for what we say (h11.LocalProtocolError)."""
        if type(event) is h11.Data and self._chunked and event.data and self.our_state is h11.SEND_BODY:
            # A piece of a body leaves every state as it is: to have h11 find that out costs more than all
            # the rest of the writing, and this runs for each token.
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        output = super().send(event)
        if isinstance(event, h11.Response):
            assert output is not None
            self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in output.lower()
        return output


def _check_head(head: h11.Request) -> None:
    fields = head.headers
    size = len(head.target) + sum(len(name) + len(value) + 4 for name, value in fields)
    if size > MAX_HEAD_BYTES or len(fields) > MAX_FIELDS:
        raise h11.RemoteProtocolError("too long a head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    if head.http_version not in (b"1.1", b"1.0"):
        raise h11.RemoteProtocolError("another version of HTTP")
    if {name for name, _ in fields} >= {b"content-length", b"transfer-encoding"}:
        # h11 goes by the latter; a proxy before us that goes by the former would see other requests.
        raise h11.RemoteProtocolError("two lengths of one body")


class Deadline:
    """One timer, which is set anew or cleared."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float, late: Callable[..., None], *arguments: object) -> None:
        """Call `late` after so many seconds, and forget what was set before."""
        self.clear()
        self._timer = self._loop.call_later(seconds, late, *arguments)

    def clear(self) -> None:
        """Nothing is awaited any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class EdgeProtocol(H11Protocol):
    """One connection; uvicorn makes these."""

    transport: GatheringTransport

    def __init__(
        self, settings: ServeSettings, refused: Callable[[Kind], None], turns: Turns, **given: Any
    ) -> None:
        super().__init__(**given)
        self._turns = turns
        self._lost = False
        self.conn = BoundedConnection()
        self.timeout_keep_alive = settings.idle_timeout  # type: ignore[assignment]  # call_later takes any
        self._settings = settings
        self._refused = refused
        self._owed: tuple[object, ...] | None = None
        self._receiving = Deadline(self.loop)
        self._sending = Deadline(self.loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head, if there is room for one more connection."""
        transport.set_write_buffer_limits(MAX_UNSENT_BYTES)  # TLS would hold half a megabyte
        super().connection_made(GatheringTransport(transport))
        if len(self.connections) > self._settings.max_connections:
            # Told rather than just closed: a client knows then that it may come again, and its user why.
            self._refuse(RequestError(CROWDED, "the server has as many connections as it takes"))
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines; the application hears of it."""
        self._lost = True
        self._receiving.clear()
        self._sending.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take some bytes of a request, those of a crowd in turns; who only looks goes past it."""
        if data.startswith(b"GET ") or self._turns.take():
            self._read(data)
        else:
            self.transport.pause_reading()  # so that nothing comes before it
            self._turns.wait(partial(self._read_later, data))

    def _read_later(self, data: bytes) -> None:
        if not self._lost and not self.transport.is_closing():
            self.transport.resume_reading()
            self._read(data)

    def _read(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        self._await_request()
        if self.cycle is not before:
            self._await_reader()  # what it left unread before is another answer's

    def on_response_complete(self) -> None:
        """An answer is written, as far as the transport goes; what comes next may be here already."""
        super().on_response_complete()
        self._await_request()
        self._await_reader()

    def pause_writing(self) -> None:
        """The application has to wait for the client."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It goes on."""
        super().resume_writing()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """What the client sent is no request that we take; h11's error, which is being handled, says why."""
        status = getattr(sys.exception(), "error_status_hint", HTTPStatus.BAD_REQUEST)
        kind, text = {
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
                TOO_LONG_HEAD,
                f"the request's head is longer than {MAX_HEAD_BYTES} bytes or {MAX_FIELDS} fields",
            ),
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
                TOO_LARGE,
                f"the body comes in more than {MAX_PIECES} pieces",
            ),
        }.get(status, (MALFORMED, "this is not a valid HTTP request"))
        self._refuse(RequestError(kind, text))

    def _await_request(self) -> None:
        """See to the deadline of what the client owes now; what it owed before keeps its own."""
        state = self.conn.their_state
        owed: tuple[object, ...] | None = (state, self.cycle)
        if self.transport.is_closing() or state not in (h11.IDLE, h11.SEND_BODY):
            owed = None
        elif owed == self._owed:
            return
        elif state is h11.IDLE and self.cycle is not None and not self.conn.trailing_data[0]:
            owed = None  # between two requests, which is uvicorn's to end
        self._owed = owed
        if owed is None:
            self._receiving.clear()
        elif state is h11.IDLE:
            self._receiving.set(self._settings.header_timeout, self._late, "head")
        else:
            self._receiving.set(self._settings.body_timeout, self._late, "body")

    def _late(self, part: str) -> None:
        self._refuse(RequestError(LATE, f"the request's {part} did not come in time"))

    def _refuse(self, error: RequestError) -> None:
        """Answer instead of the application, where nothing is answered yet, and end the connection."""
        self._refused(error.kind)
        cycle = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self._written(error, cycle.scope["path"] if cycle else ""))
        if cycle:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self._await_request()
        self._await_reader()

    def _written(self, error: RequestError, path: str) -> bytes:
        """The error as it goes over the wire; not by h11, which lets nobody answer a head that it refused."""
        response = Context().run(error_response, error, path)  # this one may be of another request
        fields = (*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close"))
        head = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()
        lines = b"".join(b"%b: %b\r\n" % field for field in fields)
        return head + lines + b"\r\n" + bytes(response.body)

    def _await_reader(self) -> None:
        """Give the client time to take some of what waits for it, where nothing goes on until it does."""
        self._sending.clear()
        self.transport.flush()  # what nobody offered to the system yet is not owed
        unsent = self.transport.get_write_buffer_size()
        answering = self.cycle is not None and not self.cycle.response_complete
        if unsent and (self.flow.write_paused or not answering):
            self._sending.set(self._settings.send_timeout, self._look_at_reader, unsent)

    def _look_at_reader(self, before: int) -> None:
        """Cut a client that took nothing.

        The system asks for more only once a third of its own buffer is free, so one that takes a byte now
        and then has taken nothing.
        """
        self.transport.flush()
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._await_reader()
