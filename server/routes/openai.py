"""What OpenAI's two text dialects share: sampling fields, limits, usage, chunks, errors in a stream."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from model.batch import SamplingParams
from server.errors import NOT_FOUND, VALIDATION, RequestError
from server.generation import Finish, Generation
from server.routes.delivery import event
from server.routes.fields import MAX_STOP_SEQUENCES, Body, Number, Seed, Text, Unsupported
from server.service import ModelInfo, Service

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16

NonEmpty = Annotated[Text, Field(min_length=1)]

NO_NAME = "dummy"
"""What huggingface_hub's InferenceClient calls the model when it knows no more than the address."""

DONE = b"data: [DONE]\n\n"

FINISH_REASONS = {Finish.EOS: "stop", Finish.LENGTH: "length", Finish.STOP: "stop"}


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = Field(False, description="one more chunk at the end with the token counts")
    continuous_usage_stats: bool = Field(
        False, description="with include_usage: the counts so far in every chunk"
    )


class SamplingFields(Body):
    """The fields that chat and plain completions have in common."""

    model: Text | None = Field(None, description="the served model's name; default: that")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1 keep all")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: (
        NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None
    ) = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="noted by nobody")
    logit_bias: Unsupported = None

    @property
    def choices(self) -> int:
        """Completions a prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self, model: ModelInfo) -> None:
        """Check what the types do not (RequestError)."""
        if self.model not in (None, model.name, NO_NAME):
            raise model_not_found(model)
        if self.stream_options is not None and not self.stream:
            raise RequestError(VALIDATION, "`stream_options` needs `stream`", param="stream_options")

    def sampling_params(
        self, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> list[SamplingParams]:
        """One for each choice; choice i draws with seed + i."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [
            SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(self.top_k or 0, 0),
                top_p=1.0 if self.top_p is None else self.top_p,
                min_p=self.min_p or 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                seed=seed + choice,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for choice in range(self.choices)
        ]


def model_not_found(model: ModelInfo) -> RequestError:
    """A model was named that is not the served one."""
    message = f"there is no model of that name; this server serves `{model.name}`"
    return RequestError(NOT_FOUND, message, param="model", code="model_not_found")


def check_length(
    num_prompt: int,
    max_tokens: int | None,
    default: int | None,
    limit: int,
    fields: tuple[str, str] = ("prompt", "max_tokens"),
) -> int:
    """Output tokens at most; by default `default`, or what fits.

    RequestError with the numbers; `fields` are the names of the first two on the wire.
    """
    if num_prompt >= limit:
        raise RequestError(
            VALIDATION,
            f"This model's maximum context length is {limit} tokens, and the prompt has {num_prompt} tokens.",
            param=fields[0],
            code="context_length_exceeded",
        )
    room = limit - num_prompt
    if max_tokens is None:
        return room if default is None else min(default, room)
    if max_tokens > room:
        raise RequestError(
            VALIDATION,
            f"This model's maximum context length is {limit} tokens, and {num_prompt + max_tokens} were "
            f"asked for: {num_prompt} in the prompt and {max_tokens} in the completion.",
            param=fields[1],
            code="context_length_exceeded",
        )
    return max_tokens


def check_token_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids of a prompt, within the vocabulary (RequestError)."""
    if not all(0 <= token < vocab_size for token in token_ids):
        raise RequestError(
            VALIDATION, f"token ids in `prompt` must be at least 0 and below {vocab_size}", param="prompt"
        )
    return tuple(token_ids)


def usage(generation: Generation, num_prompts: int) -> dict[str, Any]:
    """Token counts so far; a prompt with several choices counts once."""
    choices_each = len(generation.choices) // num_prompts
    prompts = generation.choices[::choices_each]
    prompt_tokens = sum(len(choice.prompt.token_ids) for choice in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generation.output_tokens,
        "total_tokens": prompt_tokens + generation.output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all chunks of an answer have in common."""

    prefix: str
    """Of the id: `chatcmpl` or `cmpl`."""
    object: str
    model: str
    num_prompts: int
    options: StreamOptions
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk or an answer around its choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    async def events(
        self, generation: Generation, choices: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[bytes]:
        """A chunk for each of a stream's choices, then usage if asked for, errors as events, then DONE."""
        try:
            async for choice in choices:
                more = {}
                if self.options.include_usage and self.options.continuous_usage_stats:
                    more["usage"] = usage(generation, self.num_prompts)
                yield event(self.wrap([choice], **more))
            if self.options.include_usage:
                yield event(self.wrap([], usage=usage(generation, self.num_prompts)))
        except RequestError as error:
            yield event(error.openai_body())
        yield DONE


def make_router(service: Service) -> APIRouter:
    """The model list."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    model = service.model
    card = {
        "id": model.name,
        "object": "model",
        "created": model.loaded_at,
        "owned_by": "rivulet",
        "max_model_len": model.max_model_len,
    }

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The served model by its name."""
        if name != model.name:
            raise model_not_found(model)
        return card

    return router
