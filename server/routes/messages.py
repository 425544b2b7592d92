"""Chat messages on the wire, and as the plain values that a chat template takes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from server.routes.fields import Body, Text


class TextPart(Body):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Text | None = None


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages for the template: content parts are joined into one string."""
    plain = []
    for message in messages:
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        entry = {"role": message.role, "content": content}
        plain.append(entry if message.name is None else entry | {"name": message.name})
    return plain
