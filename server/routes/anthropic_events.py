"""A turn's pieces as the events of Anthropic's /v1/messages, and as the one message that they make."""

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from server.conversation import Turn
from server.errors import RequestError
from server.generation import Finish, Generation, TextOutput
from server.routes.delivery import typed_event
from server.text.message_parser import Content, Piece, Reasoning, ToolCall

Event = dict[str, Any]


@dataclass(slots=True)
class MessageWriter:
    """Words one answer."""

    model: str
    turn: Turn
    generation: Generation
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    content: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    _open: type[Content] | type[Reasoning] | None = None
    _texts: list[str] = field(default_factory=list)
    """Of the open block."""

    async def events(self) -> AsyncIterator[Event]:
        """Every event of an answer that goes well (RequestError if the model fails)."""
        started = False
        async for output, pieces in self.turn.outputs(self.generation):
            if not started:  # the first output tells what the prefix cache had
                yield {"type": "message_start", "message": self.message()}
                yield {"type": "ping"}
                started = True
            for piece in pieces:
                for event in self._write(piece):
                    yield event
            if output.finish is not None:
                for event in self._close():
                    yield event
                self._finish(output)
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    async def stream(self) -> AsyncIterator[bytes]:
        """The same on the wire; a failure is the last event."""
        try:
            async for event in self.events():
                yield typed_event(event)
        except RequestError as error:
            yield typed_event(error.anthropic_body())

    def message(self) -> dict[str, Any]:
        """The message so far."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": list(self.content),
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """As Anthropic counts: `input_tokens` are those that no cache had."""
        cached = sum(choice.cached_tokens for choice in self.generation.choices)
        return {
            "input_tokens": self.generation.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.generation.output_tokens,
        }

    def _write(self, piece: Piece) -> Iterator[Event]:
        if isinstance(piece, ToolCall):
            yield from self._close()
            yield from self._call(piece)
            return
        if self._open is not type(piece):
            yield from self._close()
            self._open = type(piece)
            yield self._event("start", content_block=self._block(""))
        self._texts.append(piece.text)
        name = "text" if isinstance(piece, Content) else "thinking"
        yield self._event("delta", delta={"type": f"{name}_delta", name: piece.text})

    def _block(self, text: str) -> dict[str, Any]:
        if self._open is Content:
            return {"type": "text", "text": text}
        return {"type": "thinking", "thinking": text, "signature": ""}

    def _close(self) -> Iterator[Event]:
        """End the text or the thinking that is being written, if there is one."""
        if self._open is None:
            return
        yield self._event("stop")
        self.content.append(self._block("".join(self._texts)))
        self._open, self._texts = None, []

    def _call(self, call: ToolCall) -> Iterator[Event]:
        """A whole call: its input comes in one piece."""
        block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": call.name, "input": {}}
        yield self._event("start", content_block=block)
        yield self._event("delta", delta={"type": "input_json_delta", "partial_json": call.arguments})
        yield self._event("stop")
        self.content.append(block | {"input": json.loads(call.arguments)})

    def _event(self, what: str, **values: Any) -> Event:
        """An event of the block that comes after those in `content`."""
        return {"type": f"content_block_{what}", "index": len(self.content), **values}

    def _finish(self, output: TextOutput) -> None:
        called = any(block["type"] == "tool_use" for block in self.content)
        if output.finish is Finish.LENGTH:
            self.stop_reason = "max_tokens"
        elif called:
            self.stop_reason = "tool_use"
        elif isinstance(output.stop, str):
            self.stop_reason, self.stop_sequence = "stop_sequence", output.stop
        else:
            self.stop_reason = "end_turn"
