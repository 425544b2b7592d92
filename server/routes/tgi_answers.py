"""The answers and events of TGI's dialect and of the routes that generate nothing, for /openapi.json.

The routes make plain dictionaries, which costs less for each token; tests hold those to these models.
"""

from typing import Literal

from pydantic import Field, RootModel

from server.routes.openai_answers import Answer

FinishReason = Literal["length", "eos_token", "stop_sequence"]
SEED = "null if nothing was drawn"


class PrefillToken(Answer):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None = Field(description="null for the first: nothing predicts it")


class GeneratedToken(Answer):
    """A token of the output."""

    id: int
    text: str = Field(description="what it completed; empty in the middle of a character")
    logprob: float = Field(description="of the model's own distribution")
    special: bool = Field(description="not a part of generated_text")


class Sequence(Answer):
    """What is told of a continuation beside its text."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None = Field(description=SEED)
    prefill: list[PrefillToken] = Field(description="with decoder_input_details")
    tokens: list[GeneratedToken]
    top_tokens: list[list[GeneratedToken]] | None = Field(None, description="with top_n_tokens")


class BestOfSequence(Sequence):
    """A candidate that was not the best."""

    generated_text: str


class Details(Sequence):
    """With details or decoder_input_details."""

    best_of_sequences: list[BestOfSequence] | None = Field(None, description="with best_of above 1")


class GenerateAnswer(Answer):
    """One continuation of the prompt."""

    generated_text: str
    details: Details | None = None


class CompatAnswer(RootModel[list[GenerateAnswer]]):
    """A list of one."""


class StreamDetails(Answer):
    """With details."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None = Field(description=SEED)
    input_length: int


class StreamEvent(Answer):
    """A token; the last one carries the whole text."""

    index: int = Field(description="of the token, from 1")
    token: GeneratedToken
    generated_text: str | None
    details: StreamDetails | None
    top_tokens: list[GeneratedToken] | None = Field(None, description="with top_n_tokens")


class Info(Answer):
    """The model and the limits."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int = Field(description="prompts in one body of /v1/completions")
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    max_top_n_tokens: int
    model_dtype: str
    model_device_type: str
    kernels: str
    kv_cache_tokens: int
    logprobs: str


class SimpleToken(Answer):
    """A token and where it stands, in characters."""

    id: int
    text: str
    start: int
    stop: int


class TokenCounts(Answer):
    """Tokens in vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Tokens(RootModel[list[SimpleToken] | TokenCounts]):
    """A list in TGI's form, or vLLM's object."""


class ChatTokens(Answer):
    """A conversation as the model is given it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class DetokenizedText(Answer):
    """A text."""

    prompt: str


class Unhealthy(Answer):
    """The process is to be started again, or is not there yet."""

    error: Literal["unhealthy"]
    error_type: Literal["healthcheck"]


class Readiness(Answer):
    """Requests are served."""

    status: Literal["ready"]


class NotReady(Answer):
    """Requests are not served yet, or not any more."""

    status: Literal["loading", "draining", "stuck", "failed"]
    reason: str
    progress: float = Field(0.0, description="of the loading, where it is known: 0 to 1 of its present phase")
