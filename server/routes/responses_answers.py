"""The answer and the events of OpenAI's /v1/responses, as /openapi.json describes them.

The routes make plain dictionaries, which costs less for each token; tests hold those to these models.
"""

from typing import Any, Literal

from pydantic import Field

from server.routes.openai_answers import Answer

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Answer):
    """A piece of text."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[None] | None = Field(None, description="of output_text: none")
    logprobs: list[None] | None = Field(None, description="of output_text: none")


class OutputItem(Answer):
    """A message, a call that the model makes, or its reasoning."""

    id: str
    type: Literal["message", "function_call", "reasoning"]
    status: Status
    role: Literal["assistant"] | None = Field(None, description="of a message")
    content: list[Part] | None = Field(None, description="of a message or of reasoning")
    summary: list[None] | None = Field(None, description="of reasoning: none")
    call_id: str | None = Field(None, description="of a call; its output names it")
    name: str | None = Field(None, description="of a call")
    arguments: str | None = Field(None, description="of a call: a JSON object, as text")


class InputTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="taken from the prefix cache")
    cache_write_tokens: int = Field(description="always 0: what is kept costs nothing")


class OutputTokensDetails(Answer):
    """What the output's tokens are."""

    reasoning_tokens: int = Field(description="up to the last one that brought reasoning")


class ResponseUsage(Answer):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseFault(Answer):
    """Why the model failed."""

    code: Literal["server_error"]
    message: str


class ResponseObject(Answer):
    """The answer of /v1/responses; most fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix time")
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = Field(description="in the last event")
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    text: dict[str, Any]
    reasoning: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    user: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    background: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    top_logprobs: Literal[0]
    truncation: Literal["disabled"]


class ResponseEvent(Answer):
    """One event of /v1/responses; `event: ` before it has its type too."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int = Field(description="from 0")
    response: ResponseObject | None = Field(None, description="as it is so far; whole in the last event")
    output_index: int | None = Field(None, description="the item's place in the output")
    item: OutputItem | None = None
    item_id: str | None = None
    content_index: int | None = Field(None, description="always 0")
    part: Part | None = None
    delta: str | None = Field(None, description="the next piece; a call's arguments come in one")
    text: str | None = Field(None, description="all pieces together")
    logprobs: list[None] | None = Field(None, description="of output_text: none")
    name: str | None = Field(None, description="of a call")
    arguments: str | None = Field(None, description="of a call")
    code: str | None = Field(None, description="of an error")
    message: str | None = Field(None, description="of an error")
    param: str | None = Field(None, description="of an error")
    request_id: str | None = Field(None, description="of an error")
