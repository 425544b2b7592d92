"""OpenAI's /v1/completions: prompts as text or token ids in, text out."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from model.batch import Token
from server.errors import VALIDATION, RequestError
from server.generation import Generation, Prompt
from server.routes.delivery import EventStream, unless_client_leaves
from server.routes.fields import Unsupported
from server.routes.openai import (
    FINISH_REASONS,
    MAX_TOP_LOGPROBS,
    Envelope,
    NonEmpty,
    SamplingFields,
    StreamOptions,
    check_length,
    check_token_ids,
    usage,
)
from server.service import Service
from server.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64

NEUTRAL: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "best_of": (1,), "suffix": ("",)}
"""Fields that are known but not supported, with the values that ask for nothing."""

Tokens = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: (
        NonEmpty
        | Tokens
        | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool = Field(False, description="begin the text with the prompt")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Unsupported = None
    suffix: Unsupported = None


async def read(body: CompletionRequest, service: Service) -> list[Prompt]:
    """Validate a body and encode its prompts: n in a row for each of them (RequestError)."""
    body.check(service.model)
    body.refuse(NEUTRAL)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(VALIDATION, "`max_tokens` of 0 needs `echo`", param="max_tokens")
    given = body.prompt
    many = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts: list[Prompt] = []
    for prompt in many:
        if isinstance(prompt, str):
            token_ids = await service.encode(prompt)
        else:
            assert isinstance(prompt, list)
            token_ids = check_token_ids(prompt, service.tokenizer.vocab_size)
        if not token_ids:
            raise RequestError(VALIDATION, "the prompt has no tokens", param="prompt")
        max_tokens = check_length(
            len(token_ids), body.max_tokens, DEFAULT_MAX_TOKENS, service.model.max_model_len
        )
        prompts.extend(
            Prompt(token_ids, params, max_tokens, body.stops, ignore_eos=body.ignore_eos)
            for params in body.sampling_params(body.logprobs, body.logprobs if body.echo else None)
        )
    return prompts


class LogprobsWriter:
    """Completions' form of log-probabilities; offsets count characters of the tokens' own texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def write(self, tokens: list[Token]) -> dict[str, Any]:
        """The next tokens' entry."""
        text = self._tokenizer.token_text
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(text(token.id))
        return {
            "tokens": [text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens by text, the chosen one among them; nothing predicts a first token."""
        if token.logprob is None:
            return None
        best: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.id, token.logprob)):
            best.setdefault(
                self._tokenizer.token_text(token_id), logprob
            )  # texts may collide: the best stays
        return best


async def choices(
    generation: Generation, tokenizer: Tokenizer, *, echo: bool
) -> AsyncIterator[dict[str, Any]]:
    """The chunks' choices: text when there is some, the reason together with the last of it."""
    writers = [LogprobsWriter(tokenizer) for _ in generation.choices]
    held: list[list[Token]] = [[] for _ in generation.choices]
    begun: set[int] = set()
    async for output in generation:
        text, tokens = output.text, held[output.index]
        prompt = generation.choices[output.index].prompt
        if echo and output.index not in begun:
            begun.add(output.index)
            text = tokenizer.decode(prompt.token_ids, False) + text
            if prompt.params.prompt_logprobs is not None:
                tokens.append(Token(prompt.token_ids[0]))
        tokens.extend(output.prompt_tokens)
        if output.token is not None and prompt.params.logprobs is not None:
            tokens.append(output.token)
        if text or output.finish is not None:
            logprobs = writers[output.index].write(tokens) if tokens else None
            held[output.index] = []
            finish = None if output.finish is None else FINISH_REASONS[output.finish]
            yield {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def collect(generation: Generation, tokenizer: Tokenizer, *, echo: bool) -> list[dict[str, Any]]:
    """The same chunks as whole choices."""
    whole: dict[int, dict[str, Any]] = {}
    async for part in choices(generation, tokenizer, echo=echo):
        entry = whole.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
        entry["text"] += part["text"]
        entry["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            before = entry["logprobs"] or {name: [] for name in part["logprobs"]}
            entry["logprobs"] = {name: before[name] + more for name, more in part["logprobs"].items()}
    return [whole[index] for index in sorted(whole)]


def make_router(service: Service) -> APIRouter:
    """The completions route."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    tokenizer = service.tokenizer

    @router.post("/completions")
    async def completions(request: HttpRequest, body: CompletionRequest) -> Response:
        """Continue prompts, as one answer or as a stream of chunks."""
        prompts = await read(body, service)
        generation = service.generate(prompts)
        num_prompts = len(prompts) // body.choices
        options = body.stream_options or StreamOptions()
        envelope = Envelope("cmpl", "text_completion", service.model.name, num_prompts, options)
        if body.stream:
            parts = choices(generation, tokenizer, echo=body.echo)
            return EventStream(envelope.events(generation, parts), generation)
        answer = await unless_client_leaves(request, collect(generation, tokenizer, echo=body.echo))
        return JSONResponse(envelope.wrap(answer, usage=usage(generation, num_prompts)))

    return router
