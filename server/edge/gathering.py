"""What a connection writes in one turn of the event loop leaves together.

A step may bring a stream several tokens. To hand each to the system would cost more than to make it, here
and with the client, who would be woken for each.
"""

import asyncio
from typing import Any

MOST_BYTES = 16_384
"""So many are handed on at once: the transport says from its own buffer when the writer has to wait."""


class GatheringTransport(asyncio.Transport):
    """A transport before another one."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> None:
        """Take some bytes; they leave before the loop waits for anything."""
        if not self._pieces:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand on what there is."""
        if not self._pieces:
            return
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close once everything is written."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._pieces.clear()
        self._size = 0
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Bytes that the system has not taken yet."""
        return self._size + self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether it is closed or will be."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What the other one knows of the socket."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Read nothing for now."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Bytes above which, and below which again, the writer is told."""
        self._transport.set_write_buffer_limits(high, low)
