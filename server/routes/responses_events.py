"""A turn's pieces as the events of OpenAI's /v1/responses; the last of them holds the whole answer.

An answer that is not streamed is that last event's, so that both say the same.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from server.conversation import Turn
from server.errors import RequestError, request_field
from server.generation import Finish, Generation
from server.routes.delivery import typed_event
from server.routes.responses_fields import ResponseRequest
from server.text.message_parser import Content, Piece, Reasoning, ToolCall

Event = dict[str, Any]


def echo(body: ResponseRequest, turn: Turn) -> dict[str, Any]:
    """What an answer repeats of its request, with the defaults that held."""
    format = None if body.text is None else body.text.format
    choice = turn.toolbox.choice
    named = None if choice.name is None else {"type": "function", "name": choice.name}
    tools = [tool.model_dump() for tool in body.tools or ()]
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "text": {
            "format": {"type": "text"}
            if format is None
            else format.model_dump(by_alias=True, exclude_none=True)
        },
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "tools": tools,
        # Without tools a choice is `none` for the model, and `auto` is what OpenAI says.
        "tool_choice": named or (choice.mode if tools else body.tool_choice or "auto"),
        "parallel_tool_calls": turn.toolbox.parallel,
        "metadata": body.metadata or {},
        "user": body.user,
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "top_logprobs": 0,
        "truncation": "disabled",
    }


@dataclass(slots=True)
class TextItem:
    """The message, or the reasoning, that is being written."""

    index: int
    kind: type[Content] | type[Reasoning]
    id: str
    texts: list[str] = field(default_factory=list)

    @property
    def event_name(self) -> str:
        """What stands in the names of its events."""
        return "output_text" if self.kind is Content else "reasoning_text"

    def part(self, text: str) -> dict[str, Any]:
        """Its only part."""
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.kind is Content else {}
        return {"type": self.event_name, "text": text, **more}

    def item(self, status: str, *parts: dict[str, Any]) -> dict[str, Any]:
        """The item of the output."""
        if self.kind is Content:
            own: dict[str, Any] = {"type": "message", "role": "assistant"}
        else:
            own = {"type": "reasoning", "summary": []}
        return {"id": self.id, **own, "status": status, "content": list(parts)}


@dataclass(slots=True)
class ResponseWriter:
    """Words one answer."""

    model: str
    echo: dict[str, Any]
    turn: Turn
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    reasoning_tokens: int = 0
    _sequence: int = 0
    _open: TextItem | None = None

    async def events(self, generation: Generation) -> AsyncIterator[Event]:
        """Every event of an answer that goes well (RequestError if the model fails)."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))
        finish = None
        async for output, pieces in self.turn.outputs(generation):
            for piece in pieces:
                if isinstance(piece, Reasoning):
                    self.reasoning_tokens = generation.output_tokens
                for event in self._write(piece):
                    yield event
            finish = output.finish
        status = "incomplete" if finish is Finish.LENGTH else "completed"
        if not self.output and self._open is None:
            for event in self._start(Content):
                yield event
        for event in self._close(status):
            yield event
        yield self._event(f"response.{status}", response=self._response(status, generation))

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same on the wire; a failure is an event too."""
        try:
            async for event in self.events(generation):
                yield typed_event(event)
        except RequestError as error:
            fault = {"code": error.code or error.kind.openai_type, "message": error.message}
            for event in self._close("incomplete"):
                yield typed_event(event)
            yield typed_event(self._event("error", **fault, param=error.param, **request_field()))
            fault["code"] = "server_error"
            response = self._response("failed", generation) | {"error": fault}
            yield typed_event(self._event("response.failed", response=response))

    def _event(self, type: str, **values: Any) -> Event:
        event = {"type": type, "sequence_number": self._sequence, **values}
        self._sequence += 1
        return event

    def _response(self, status: str, generation: Generation | None = None) -> dict[str, Any]:
        """The answer so far; with its `generation` at the end."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": self.model,
            "output": list(self.output),
            "usage": None if generation is None else self._usage(generation),
            **self.echo,
        }

    def _usage(self, generation: Generation) -> dict[str, Any]:
        cached = sum(choice.cached_tokens for choice in generation.choices)
        return {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generation.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": generation.prompt_tokens + generation.output_tokens,
        }

    def _write(self, piece: Piece) -> Iterator[Event]:
        if isinstance(piece, ToolCall):
            yield from self._close("completed")
            yield from self._call(piece)
            return
        if self._open is None or self._open.kind is not type(piece):
            yield from self._close("completed")
            yield from self._start(type(piece))
        assert self._open is not None
        self._open.texts.append(piece.text)
        yield self._text_event(self._open, "delta", delta=piece.text)

    def _start(self, kind: type[Content] | type[Reasoning]) -> Iterator[Event]:
        prefix = "msg" if kind is Content else "rs"
        text = self._open = TextItem(len(self.output), kind, f"{prefix}_{secrets.token_hex(24)}")
        yield self._item_event("added", text.index, text.item("in_progress"))
        yield self._part_event("added", text, "")

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is being written, if there is one."""
        text, self._open = self._open, None
        if text is None:
            return
        whole = "".join(text.texts)
        self.output.append(text.item(status, text.part(whole)))
        yield self._text_event(text, "done", text=whole)
        yield self._part_event("done", text, whole)
        yield self._item_event("done", text.index, self.output[-1])

    def _call(self, call: ToolCall) -> Iterator[Event]:
        """A whole call: its arguments come in one piece."""
        index = len(self.output)
        item = {
            "id": f"fc_{secrets.token_hex(24)}",
            "type": "function_call",
            "status": "completed",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": call.name,
            "arguments": call.arguments,
        }
        self.output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        yield self._item_event("added", index, item | {"status": "in_progress", "arguments": ""})
        name = "response.function_call_arguments"
        yield self._event(f"{name}.delta", **place, delta=call.arguments)
        yield self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments)
        yield self._item_event("done", index, item)

    def _item_event(self, what: str, index: int, item: dict[str, Any]) -> Event:
        return self._event(f"response.output_item.{what}", output_index=index, item=item)

    def _part_event(self, what: str, text: TextItem, content: str) -> Event:
        place = {"item_id": text.id, "output_index": text.index, "content_index": 0}
        return self._event(f"response.content_part.{what}", **place, part=text.part(content))

    def _text_event(self, item: TextItem, what: str, **values: str) -> Event:
        place = {"item_id": item.id, "output_index": item.index, "content_index": 0}
        more: dict[str, Any] = {"logprobs": []} if item.kind is Content else {}
        return self._event(f"response.{item.event_name}.{what}", **place, **values, **more)
