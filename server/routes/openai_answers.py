"""The answers, chunks and errors of OpenAI's dialect, as /openapi.json describes them.

The routes make plain dictionaries, which costs less for each token; tests hold those to these models.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """What every object of an answer is: nothing but what is declared."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="taken from the prefix cache")


class Usage(Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TextLogprobs(Answer):
    """Log-probabilities of a text; one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="in characters of the tokens' own texts")


class TextChoice(Answer):
    """One text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description="the stop string or token that was found")


class Completion(Answer):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Unix time")
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(Answer):
    """The next piece of one text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="in the last chunk of each choice")
    stop_reason: str | int | None = Field(None, description="with the reason: the stop string or token")


class CompletionChunk(Answer):
    """One event of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChunkChoice] = Field(description="none in the chunk with the usage")
    usage: Usage | None = Field(None, description="as `stream_options` ask for")


class LikelyToken(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken):
    """A token of the answer."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """Log-probabilities of the answer's tokens, those of reasoning and calls too."""

    content: list[ScoredToken]


class Function(Answer):
    """A function and what it is called with."""

    name: str
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(Answer):
    """The model's answer."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where there are calls and no text")
    reasoning_content: str | None = Field(None, description="of a model that thinks in tags")
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = Field(description="the stop string or token that was found")


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Unix time")
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(ToolCall):
    """A whole call: its arguments come in one piece."""

    index: int


class Delta(Answer):
    """What is new: the role at first, then pieces, then nothing, with the finish reason."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    """The next piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None = Field(description="in the last chunk of each choice")
    stop_reason: str | int | None = Field(None, description="with the reason: the stop string or token")


class ChatCompletionChunk(Answer):
    """One event of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice] = Field(description="none in the chunk with the usage")
    usage: Usage | None = Field(None, description="as `stream_options` ask for")


class ModelCard(Answer):
    """The served model, or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time at which it was loaded")
    owned_by: str
    max_model_len: int = Field(description="most tokens of prompt and output together")
    parent: str | None = Field(None, description="the served model, of an adapter")


class ModelList(Answer):
    """The served model, under each of its names, and its adapters."""

    object: Literal["list"]
    data: list[ModelCard]


class OpenAIFault(Answer):
    """Why a call failed."""

    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: str | None
    request_id: str = Field(description="as in the header X-Request-Id and in the server's log")


class OpenAIError(Answer):
    """An error on /v1; in a stream that has begun it is an event, before `[DONE]`."""

    error: OpenAIFault
