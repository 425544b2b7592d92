"""The bodies of Anthropic's /v1/messages and its count_tokens, and the conversation that they make.

Known fields that cannot be served are refused by name; the blocks of earlier answers are taken back.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from server.conversation import Conversation, Structure, Toolbox
from server.errors import VALIDATION, RequestError
from server.routes.fields import MAX_STOP_SEQUENCES, Body, Number, Text, Unsupported
from server.routes.openai_fields import NonEmpty, SamplingFields, read_model
from server.routes.structured import Schema
from server.service import ModelInfo, Service
from server.text.tools import MAX_TOOLS

Refused = Annotated[None, Field(description="not supported")]
"""A nested field that only null may stand in."""


class CacheControl(Body):
    """Where a prompt is worth keeping; the prefix cache keeps every prompt while there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m"] | None = None


class TextBlock(Body):
    """A block of text; nothing else is served here."""

    type: Literal["text"]
    text: Text
    citations: Refused = None
    cache_control: CacheControl | None = None


def _as_blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[
    list[TextBlock],
    Field(fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class BlockField(Body):
    """A block of a message: text, what an earlier answer held beside it, or the result of a call."""

    type: Literal["text", "tool_use", "tool_result", "thinking"]
    text: Text | None = Field(None, description="of text")
    id: Text | None = Field(None, description="of tool_use, for the template")
    name: Text | None = Field(None, description="of tool_use")
    input: dict[str, Any] | None = Field(None, description="of tool_use")
    tool_use_id: Text | None = Field(None, description="of tool_result, for the template")
    content: Texts | None = Field(None, description="of tool_result")
    is_error: bool | None = Field(None, description="of tool_result: its text begins with `Error: `")
    thinking: Text | None = Field(None, description="of thinking, for the template")
    signature: Text | None = Field(None, description="a label: ours are empty")
    citations: Refused = None
    cache_control: CacheControl | None = None


NEEDED = {
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking",),
}
MAY_HOLD = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


class TurnField(Body):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        list[BlockField],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[BlockField]),
    ]


class CustomTool(Body):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Text
    description: Text | None = None
    input_schema: Schema
    strict: bool | None = Field(None, description="a call that is required follows the schema in any case")
    cache_control: CacheControl | None = None
    defer_loading: Literal[False] | None = None
    input_examples: Refused = None


class ToolChoiceField(Body):
    """Whether a tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = Field(None, description="with type tool")
    disable_parallel_tool_use: bool | None = Field(None, description="true keeps the first call of an answer")

    def choice(self) -> str | dict[str, Any]:
        """The same in OpenAI's words (RequestError)."""
        if self.type == "tool":
            if self.name is None:
                place = "tool_choice.name"
                raise RequestError(VALIDATION, f"`{place}`: Field required", param=place)
            return {"type": "function", "function": {"name": self.name}}
        if self.name is not None:
            message = "`tool_choice.name` needs `type` to be tool"
            raise RequestError(VALIDATION, message, param="tool_choice.name")
        return "required" if self.type == "any" else self.type


class ThinkingField(Body):
    """Whether a model that can think does: the chat template's `enable_thinking`."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="a target, as for Anthropic; what bounds thinking and text together is max_tokens"
    )
    display: Refused = None


class MetadataField(Body):
    """Who asks."""

    user_id: Text | None = Field(None, description="a label, noted by nobody")


class ConversationFields(Body):
    """The fields that make the prompt."""

    model: Text | None = Field(None, description="name or alias of the model (default), or an adapter's")
    messages: Annotated[list[TurnField], Field(min_length=1, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoiceField | None = Field(
        None, description="default auto with tools; none hides the tools from the model"
    )
    thinking: ThinkingField | None = Field(None, description="enabled only for a model that thinks")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="plain values for the chat template, such as enable_thinking"
    )
    cache_control: CacheControl | None = None
    # Known, but not supported.
    mcp_servers: Unsupported = None
    context_management: Unsupported = None
    output_config: Unsupported = None
    output_format: Unsupported = None
    speed: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mcp_servers": ([],),
        "context_management": (),
        "output_config": ({},),
        "output_format": (),
        "speed": ("standard",),
    }
    """Fields that are known but not supported, with the values that ask for nothing."""

    def conversation(self, service: Service, structure: Structure | None = None) -> Conversation:
        """What it asks, whatever the dialect (RequestError)."""
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
            for tool in self.tools or ()
        ]
        tools = [{"type": "function", "function": function} for function in functions]
        field = self.tool_choice
        choice = None if field is None else field.choice()
        toolbox = Toolbox.read(tools, choice, field is None or not field.disable_parallel_tool_use)
        messages = plain_messages(self.messages)
        if self.system:
            messages.insert(0, {"role": "system", "content": "\n".join(block.text for block in self.system)})
        values = dict(self.chat_template_kwargs or {})
        if self.thinking is not None:
            values["enable_thinking"] = self._thinks(service)
        return Conversation(messages, toolbox, structure, values)

    def _thinks(self, service: Service) -> bool:
        assert self.thinking is not None
        enabled = self.thinking.type == "enabled"
        if enabled and not (service.chat_template is not None and service.chat_template.thinks):
            raise RequestError(VALIDATION, "`thinking`: this model does not think", param="thinking")
        if not enabled and self.thinking.budget_tokens is not None:
            place = "thinking.budget_tokens"
            raise RequestError(VALIDATION, f"`{place}` needs `type` to be enabled", param=place)
        return enabled


class CountRequest(ConversationFields):
    """The body of /v1/messages/count_tokens."""

    def check(self, model: ModelInfo) -> None:
        """Check what the types do not (RequestError)."""
        read_model(self.model, model)
        self.refuse(self.NEUTRAL)


class MessagesRequest(ConversationFields, SamplingFields):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="default 1; 0 is greedy"
    )
    stop_sequences: Annotated[list[NonEmpty], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None = (
        Field(None, description="the text ends before the first of these that appears in it")
    )
    metadata: MetadataField | None = None
    # Known, but not supported.
    stop: Unsupported = None
    n: Unsupported = None
    response_format: Unsupported = None
    stream_options: Unsupported = None
    container: Unsupported = None
    diagnostics: Unsupported = None
    inference_geo: Unsupported = None
    service_tier: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = (
        SamplingFields.NEUTRAL
        | ConversationFields.NEUTRAL
        | {
            "stop": (),
            "n": (1,),
            "response_format": (),
            "stream_options": (),
            "container": (),
            "diagnostics": (),
            "inference_geo": (),
            "service_tier": ("auto", "standard_only"),
        }
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return tuple(self.stop_sequences or ())

    def check(self, model: ModelInfo) -> None:
        """Check what the types do not (RequestError)."""
        super().check(model)
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            place = "thinking.budget_tokens"
            raise RequestError(VALIDATION, f"`{place}` must be less than `max_tokens`", param=place)


def plain_messages(messages: Sequence[TurnField]) -> list[dict[str, Any]]:
    """Messages for the template (RequestError).

    A result is a message of its own; texts are joined by line ends.
    """
    if messages[-1].role == "assistant":
        fault = "`messages` must end with one of role user: an answer that was begun cannot be continued"
        raise RequestError(VALIDATION, fault, param="messages")
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        for place, block in enumerate(message.content):
            _check(block, message.role, f"messages.{index}.content.{place}")
        add = _add_answer if message.role == "assistant" else _add_question
        add(plain, message.content)
    return plain


def _check(block: BlockField, role: str, place: str) -> None:
    if block.type not in MAY_HOLD[role]:
        text = f"`{place}.type`: a message of role {role} has no {block.type}"
        raise RequestError(VALIDATION, text, param=f"{place}.type")
    for name in NEEDED[block.type]:
        if getattr(block, name) is None:
            raise RequestError(VALIDATION, f"`{place}.{name}`: Field required", param=f"{place}.{name}")
    if block.input is not None:
        try:
            json.dumps(block.input, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise RequestError(
                VALIDATION, f"`{place}.input` is not valid JSON", param=f"{place}.input"
            ) from None


def _add_question(plain: list[dict[str, Any]], blocks: Sequence[BlockField]) -> None:
    texts: list[str] = []

    def end() -> None:
        if texts:
            plain.append({"role": "user", "content": "\n".join(texts)})
            texts.clear()

    for block in blocks:
        if block.type == "text":
            texts.append(block.text or "")
            continue
        end()
        result = "\n".join(text.text for text in block.content or ())
        content = f"Error: {result}" if block.is_error else result
        plain.append({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})
    end()


def _add_answer(plain: list[dict[str, Any]], blocks: Sequence[BlockField]) -> None:
    texts = [block.text or "" for block in blocks if block.type == "text"]
    thoughts = [block.thinking or "" for block in blocks if block.type == "thinking"]
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls := [block for block in blocks if block.type == "tool_use"]:
        message["tool_calls"] = [_call(block) for block in calls]
    plain.append(message)


def _call(block: BlockField) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}
