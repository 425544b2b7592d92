"""The body of OpenAI's /v1/responses, and the conversation that its items make.

Known fields that cannot be served are refused by name; the items of earlier answers are taken back.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.conversation import Conversation, Structure, Toolbox
from server.errors import VALIDATION, RequestError
from server.routes.fields import Body, Text, Unsupported
from server.routes.openai_fields import SamplingFields, StreamOptions
from server.routes.structured import Schema, read_structure, schema_text
from server.service import ModelInfo
from server.text.grammar import GrammarSpec
from server.text.tools import MAX_TOOLS

MAX_PAIRS = 16
MAX_KEY = 64
MAX_VALUE = 512

Refused = Annotated[None, Field(description="not supported")]
"""A nested field that only null may stand in."""


class ItemText(Body):
    """A part of a content; only text is served."""

    type: Literal["input_text", "output_text", "reasoning_text"]
    text: Text


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[
    list[ItemText],
    Field(fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[ItemText]),
]


class Item(Body):
    """One item of the input: a message, or what an earlier answer held, or the result of a call."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Text | None = Field(None, description="a label: nothing is stored to be found by it")
    status: Text | None = Field(None, description="a label")
    role: Literal["user", "assistant", "system", "developer"] | None = Field(
        None, description="of a message; developer means system"
    )
    content: Parts | None = Field(None, description="of a message or of reasoning")
    call_id: Text | None = Field(None, description="of a call and of its output, for the template")
    name: Text | None = Field(None, description="of a call")
    arguments: Text | None = Field(None, description="of a call: a JSON object, as text")
    output: Parts | None = Field(None, description="of a call's output")
    summary: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="of reasoning: empty")
    encrypted_content: Refused = None


NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


def _as_items(input: Any) -> Any:
    return [{"role": "user", "content": input}] if isinstance(input, str) else input


Items = Annotated[
    list[Item],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: Schema | None = Field(None, description="a JSON schema; default: no parameters")
    strict: bool | None = Field(None, description="a call that is required follows the schema in any case")


class NamedFunctionTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(Body):
    """The form of the text; the model is not told, so the prompt should tell it."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = Field(None, description="a label")
    description: Text | None = Field(None, description="a label")
    schema_: Schema | None = Field(None, alias="schema", description="with type json_schema")
    strict: bool | None = Field(None, description="the schema holds in any case")

    def spec(self) -> GrammarSpec | None:
        """Which grammar it asks for (RequestError)."""
        place = "text.format.schema"
        if self.type == "json_schema":
            if self.schema_ is None:
                raise RequestError(VALIDATION, f"`{place}`: Field required", param=place)
            return GrammarSpec("json_schema", schema_text(self.schema_, place))
        if self.schema_ is not None:
            raise RequestError(VALIDATION, f"`{place}` needs `type` to be json_schema", param=place)
        return GrammarSpec("json_object") if self.type == "json_object" else None


class TextOptions(Body):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Body):
    """What can be asked of a model that thinks."""

    effort: Literal["none"] | None = Field(
        None, description="none: the chat template's `enable_thinking` is false"
    )
    summary: Refused = None
    generate_summary: Refused = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(StreamOptions):
    """Of a stream of typed events; the usage always comes with the last one."""

    include_usage: Unsupported = None
    continuous_usage_stats: Unsupported = None


def _check_pairs(pairs: dict[str, Any]) -> dict[str, Any]:
    """Not by types: pydantic's errors would repeat the keys."""
    for key, value in pairs.items():
        fits = isinstance(value, str) and len(key) <= MAX_KEY and len(value) <= MAX_VALUE
        if not fits or any("\ud800" <= char <= "\udfff" for char in key + value):
            raise PydanticCustomError(
                "metadata", f"Keys are up to {MAX_KEY} characters, values up to {MAX_VALUE}, all of them text"
            )
    return pairs


Metadata = Annotated[dict[str, Any], Field(max_length=MAX_PAIRS), AfterValidator(_check_pairs)]


class ResponseRequest(SamplingFields):
    """The body of /v1/responses."""

    input: Items = Field(description="a text, which is a user's message, or items")
    instructions: Text | None = Field(None, description="a system message before the input")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="default: what fits")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = Field(
        None, description="default auto with tools; none hides the tools from the model"
    )
    parallel_tool_calls: bool | None = Field(
        None, description="default true; false keeps the first call of an answer"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="plain values for the chat template, such as enable_thinking"
    )
    metadata: Metadata | None = Field(None, description="given back with the answer")
    prompt_cache_key: Text | None = Field(None, description="a label, given back with the answer")
    safety_identifier: Text | None = Field(None, description="a label, given back with the answer")
    stream_options: ResponseStreamOptions | None = Field(None, description="with stream only")
    # Known, but not supported.
    max_tokens: Unsupported = None
    max_completion_tokens: Unsupported = None
    messages: Unsupported = None
    n: Unsupported = None
    response_format: Unsupported = None
    reasoning_effort: Unsupported = None
    # Nothing is kept: an answer that says it was stored could not be had again by its id.
    store: Unsupported = None
    previous_response_id: Unsupported = None
    conversation: Unsupported = None
    background: Unsupported = None
    background_options: Unsupported = None
    include: Unsupported = None
    truncation: Unsupported = None
    max_tool_calls: Unsupported = None
    top_logprobs: Unsupported = None
    prompt: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    access_programs: Unsupported = None
    image: Unsupported = None
    service_tier: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = SamplingFields.NEUTRAL | {
        "max_tokens": (),
        "max_completion_tokens": (),
        "messages": (),
        "n": (1,),
        "response_format": (),
        "reasoning_effort": (),
        "store": (False,),
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "background_options": (),
        "include": ([],),
        "truncation": ("disabled",),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "context_management": ([],),
        "moderation": (),
        "access_programs": (),
        "image": (),
        "service_tier": ("auto", "default"),
    }

    def check(self, model: ModelInfo) -> None:
        """Check what the types do not (RequestError)."""
        super().check(model)
        if self.stream_options is not None:
            self.stream_options.refuse({"include_usage": (False,), "continuous_usage_stats": (False,)})

    def structure(self) -> Structure | None:
        """What the answer must match (RequestError)."""
        spec = None if self.text is None or self.text.format is None else self.text.format.spec()
        if spec is None:
            return read_structure(None, self.structured_outputs)
        if self.structured_outputs is not None:
            message = "give `text.format` or `structured_outputs`, not both"
            raise RequestError(VALIDATION, message, param="structured_outputs")
        return Structure(spec, "text.format")

    def to_conversation(self) -> Conversation:
        """What it asks, whatever the dialect (RequestError)."""
        for index, tool in enumerate(self.tools or ()):
            schema_text(tool.parameters, f"tools.{index}.parameters")  # they are given back
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools or ()
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            choice = {"type": "function", "function": {"name": choice.name}}
        messages = plain_items(self.input)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        values = dict(self.chat_template_kwargs or {})
        if self.reasoning is not None and self.reasoning.effort is not None:
            values["enable_thinking"] = False
        return Conversation(
            messages, Toolbox.read(tools, choice, self.parallel_tool_calls), self.structure(), values
        )


def plain_items(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as messages for the template (RequestError).

    What one answer held (reasoning, a message, calls) is one message again.
    """
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # the one that the next part of an answer may still join
    for index, item in enumerate(items):
        for name in NEEDED[item.type]:
            if getattr(item, name) is None:
                place = f"input.{index}.{name}"
                raise RequestError(VALIDATION, f"`{place}`: Field required", param=place)
        text = "".join(part.text for part in item.content or ())
        if item.type == "function_call_output":
            answer = None
            result = "".join(part.text for part in item.output or ())
            messages.append({"role": "tool", "content": result, "tool_call_id": item.call_id})
        elif item.type == "message" and item.role != "assistant":
            answer = None
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text})
        else:
            follows = answer is None or (
                item.type != "function_call" and ("tool_calls" in answer or bool(answer["content"]))
            )
            if follows:
                messages.append({"role": "assistant", "content": ""})
            answer = messages[-1]
            if item.type == "reasoning":
                answer["reasoning_content"] = answer.get("reasoning_content", "") + text
            elif item.type == "message":
                answer["content"] = text
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                answer.setdefault("tool_calls", []).append(call)
    return messages
