"""The answers, events and errors of Anthropic's /v1/messages, as /openapi.json describes them.

The routes make plain dictionaries, which costs less for each token; tests hold those to these models.
"""

from typing import Any, Literal

from pydantic import Field

from server.routes.openai_answers import Answer

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ContentBlock(Answer):
    """A text, the model's thinking, or a call that it makes."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = Field(None, description="of text")
    thinking: str | None = Field(None, description="of thinking")
    signature: Literal[""] | None = Field(None, description="of thinking: none")
    id: str | None = Field(None, description="of tool_use; its result names it")
    name: str | None = Field(None, description="of tool_use")
    input: dict[str, Any] | None = Field(None, description="of tool_use; empty where a block begins")


class MessageUsage(Answer):
    """Token counts; the three of the input add up to all of it."""

    input_tokens: int = Field(description="those that were computed")
    cache_creation_input_tokens: int = Field(description="always 0: what is kept costs nothing")
    cache_read_input_tokens: int = Field(description="taken from the prefix cache")
    output_tokens: int


class MessageAnswer(Answer):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None = Field(description="null where a stream begins")
    stop_sequence: str | None = Field(description="the one that was found")
    usage: MessageUsage


class BlockDelta(Answer):
    """What is new in a block, or in the message."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = Field(None, description="the whole input, in one piece")
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class AnthropicFault(Answer):
    """Why a call failed."""

    type: str
    message: str


class AnthropicError(Answer):
    """An error on /v1/messages; in a stream that has begun it is the last event."""

    type: Literal["error"]
    error: AnthropicFault
    request_id: str = Field(description="as in the header X-Request-Id and in the server's log")


class MessageEvent(Answer):
    """One event of /v1/messages; `event: ` before it has its type too."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]
    message: MessageAnswer | None = Field(None, description="without content")
    index: int | None = Field(None, description="the block's place in the content")
    content_block: ContentBlock | None = Field(None, description="empty")
    delta: BlockDelta | None = None
    usage: MessageUsage | None = None
    error: AnthropicFault | None = None
    request_id: str | None = Field(None, description="of an error")


class TokenCount(Answer):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int
