"""The fields that OpenAI's two text dialects share, their bounds, and what they mean to the sampler."""

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import Field

from model.batch import SamplingParams
from server.conversation import Structure
from server.errors import NOT_FOUND, VALIDATION, RequestError
from server.generation import Prompt
from server.routes.fields import (
    MAX_STOP_SEQUENCES,
    Body,
    LogitBias,
    Number,
    Seed,
    Text,
    TokenIds,
    Unsupported,
    check_stop_token_ids,
    read_logit_bias,
)
from server.routes.structured import ResponseFormat, StructuredOutputs, read_structure
from server.service import NO_NAMES, ModelInfo, Service
from server.text.grammar import Grammar

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 16

NonEmpty = Annotated[Text, Field(min_length=1)]

GUIDED = ("json", "regex", "choice", "grammar", "json_object", "decoding_backend", "whitespace_pattern")
"""vLLM's older `guided_...` fields."""


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = Field(False, description="one more chunk at the end with the token counts")
    continuous_usage_stats: bool = Field(
        False, description="with include_usage: the counts so far in every chunk"
    )
    include_obfuscation: Unsupported = None


class SamplingFields(Body):
    """The fields that chat and plain completions have in common."""

    model: Text | None = Field(None, description="name or alias of the model (default), or an adapter's")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="default 1; 0 is greedy"
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(None, description="default 1, which keeps all")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 and -1 keep all")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(None, description="default 0, which keeps all")
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None, description="default 1, which keeps all"
    )
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = Field(None, description="default 1, off")
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = Field(None, description="choice i draws with seed + i; default: a random one")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="choices; default 1")
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="no end-of-text or stop token before so many"
    )
    stop: (
        NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None
    ) = Field(None, description="the text ends before the first of these that appears in it")
    stop_token_ids: TokenIds | None = Field(None, description="tokens that end the text")
    ignore_eos: bool = Field(False, description="go on after the end of the text")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="with stream only")
    user: Text | None = Field(None, description="a label, noted by nobody")
    # Known, but not supported.
    use_beam_search: Unsupported = None
    length_penalty: Unsupported = None
    include_stop_str_in_output: Unsupported = None
    skip_special_tokens: Unsupported = None
    spaces_between_special_tokens: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    prompt_logprobs: Unsupported = None
    allowed_token_ids: Unsupported = None
    bad_words: Unsupported = None
    logits_processors: Unsupported = None
    return_tokens_as_token_ids: Unsupported = None
    return_token_ids: Unsupported = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None
    guided_json_object: Unsupported = None
    guided_decoding_backend: Unsupported = None
    guided_whitespace_pattern: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "prompt_logprobs": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "logits_processors": ([],),
        "return_tokens_as_token_ids": (False,),
        "return_token_ids": (False,),
    }
    """Fields that are known but not supported, with the values that ask for nothing."""

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
        read_model(self.model, model)
        self.refuse(self.NEUTRAL)
        for name in (f"guided_{part}" for part in GUIDED):
            if getattr(self, name) is not None:
                message = f"`{name}` is not supported: use `structured_outputs`"
                raise RequestError(VALIDATION, message, param=name)
        if self.stream_options is not None:
            if not self.stream:
                raise RequestError(VALIDATION, "`stream_options` needs `stream`", param="stream_options")
            self.stream_options.refuse({"include_obfuscation": (False,)})

    def structure(self) -> Structure | None:
        """What the answer must match (RequestError)."""
        return read_structure(self.response_format, self.structured_outputs)

    def prompts(
        self,
        token_ids: tuple[int, ...],
        max_tokens: int,
        service: Service,
        *,
        count: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> list[Prompt]:
        """`count` prompts of the same tokens (RequestError); the i-th draws with seed + i."""
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            message = (
                f"`min_tokens` must be at most the {max_tokens} tokens that may come. Given: {min_tokens}"
            )
            raise RequestError(VALIDATION, message, param="min_tokens")
        vocab_size = service.tokenizer.vocab_size
        stop_ids = check_stop_token_ids(self.stop_token_ids, vocab_size)
        logit_bias = read_logit_bias(self.logit_bias, vocab_size)
        adapter = read_model(self.model, service.model)
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [
            Prompt(
                token_ids,
                SamplingParams(
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_k=max(self.top_k or 0, 0),
                    top_p=1.0 if self.top_p is None else self.top_p,
                    min_p=self.min_p or 0.0,
                    typical_p=1.0 if self.typical_p is None else self.typical_p,
                    repetition_penalty=self.repetition_penalty or 1.0,
                    frequency_penalty=self.frequency_penalty or 0.0,
                    presence_penalty=self.presence_penalty or 0.0,
                    logit_bias=logit_bias,
                    min_tokens=min_tokens,
                    seed=seed + index,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                ),
                max_tokens,
                self.stops,
                ignore_eos=self.ignore_eos,
                stop_token_ids=stop_ids,
                grammar=grammar,
                adapter=adapter,
            )
            for index in range(count)
        ]


def read_model(name: str | None, model: ModelInfo) -> int:
    """The number of the adapter that `model` names; 0 for the model itself (RequestError)."""
    if name is None or name in (*model.names, *NO_NAMES):
        return 0
    adapter = model.adapter(name)
    if adapter is None:
        raise model_not_found(model)
    return adapter


def model_not_found(model: ModelInfo) -> RequestError:
    """A model was named that is neither the served one nor one of its adapters."""
    served = ", ".join(f"`{name}`" for name in (model.name, *model.adapters))
    message = f"there is no model of that name; this server serves {served}"
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
