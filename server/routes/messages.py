"""Chat messages on the wire, and as the plain values that a chat template takes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from server.errors import VALIDATION, RequestError
from server.routes.fields import Body, Text

MAX_CALLS = 128


class TextPart(Body):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    """Which function a model called, and with what."""

    name: Text
    arguments: Text = Field("{}", description="a JSON object, as text")


class MessageCall(Body):
    """A call that an earlier answer made."""

    id: Text | None = Field(None, description="for the template")
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of a conversation."""

    role: Annotated[Text, Field(min_length=1, max_length=64)] = Field(
        description="system, user, assistant, tool, or what else the template knows; developer means system"
    )
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description="may be absent beside `tool_calls` only"
    )
    name: Text | None = Field(None, description="for the template")
    reasoning_content: Text | None = Field(None, description="of an earlier answer, for the template")
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="of an earlier answer"
    )
    tool_call_id: Text | None = Field(None, description="of a tool's answer, for the template")


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for the template: content parts are joined into one string (RequestError)."""
    plain = []
    for index, message in enumerate(messages):
        entry = message.model_dump(exclude_none=True)
        if message.content is None:
            if not message.tool_calls:
                place = f"messages.{index}.content"
                raise RequestError(VALIDATION, f"`{place}`: Field required", param=place)
            entry["content"] = ""
        elif not isinstance(message.content, str):
            entry["content"] = "".join(part.text for part in message.content)
        if message.role == "developer":
            entry["role"] = "system"
        plain.append(entry)
    return plain
