"""OpenAI's /v1/completions: prompts as text or token ids in, text out."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from model.batch import Token
from server.errors import VALIDATION, RequestError
from server.generation import Generation, Prompt, TextOutput
from server.routes.delivery import EventStream, unless_client_leaves
from server.routes.described import OPENAI_ERRORS, answers
from server.routes.fields import Unsupported
from server.routes.openai import FINISH_REASONS, Envelope, usage
from server.routes.openai_answers import Completion, CompletionChunk
from server.routes.openai_fields import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    NonEmpty,
    SamplingFields,
    StreamOptions,
    check_length,
)
from server.service import Service
from server.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64

Tokens = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: (
        NonEmpty
        | Tokens
        | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="a text, token ids, or a list of either")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="default 16; 0 with echo only")
    echo: bool = Field(False, description="begin the text with the prompt")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="tell each token's log-probability, and so many of the likeliest tokens"
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="candidates, of which the n with the highest mean log-probability are given"
    )
    add_special_tokens: Unsupported = None
    prompt_embeds: Unsupported = None
    suffix: Unsupported = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = SamplingFields.NEUTRAL | {
        "add_special_tokens": (True,),
        "prompt_embeds": (),
        "suffix": ("",),
    }

    @property
    def candidates(self) -> int:
        """Completions made of each prompt (RequestError)."""
        if self.best_of is None:
            return self.choices
        if self.best_of < self.choices:
            raise RequestError(VALIDATION, "`best_of` must be at least `n`", param="best_of")
        if self.best_of > self.choices and self.stream:
            message = "`best_of` must equal `n` in a stream"
            raise RequestError(VALIDATION, message, param="best_of")
        return self.best_of


async def read(body: CompletionRequest, service: Service) -> list[Prompt]:
    """Validate a body and encode its prompts: all candidates in a row for each of them (RequestError)."""
    body.check(service.model)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(VALIDATION, "`max_tokens` of 0 needs `echo`", param="max_tokens")
    count, structure = body.candidates, body.structure()
    grammar = None if structure is None else await service.compile(structure.spec, structure.field)
    scored = 0 if count > body.choices else None
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
        limit = service.model.max_model_len
        prompts += body.prompts(
            token_ids,
            check_length(len(token_ids), body.max_tokens, DEFAULT_MAX_TOKENS, limit),
            service,
            count=count,
            logprobs=scored if body.logprobs is None else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=grammar,
        )
    return prompts


def check_token_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids of a prompt, within the vocabulary (RequestError)."""
    if not all(0 <= token < vocab_size for token in token_ids):
        raise RequestError(
            VALIDATION, f"token ids in `prompt` must be at least 0 and below {vocab_size}", param="prompt"
        )
    return tuple(token_ids)


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
    outputs: AsyncIterator[TextOutput],
    prompts: Sequence[Prompt],
    body: CompletionRequest,
    tokenizer: Tokenizer,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks' choices: text when there is some, the reason together with the last of it."""
    writers = [LogprobsWriter(tokenizer) for _ in prompts]
    held: list[list[Token]] = [[] for _ in prompts]
    begun: set[int] = set()
    async for output in outputs:
        text, tokens = output.text, held[output.choice]
        prompt = prompts[output.choice]
        if body.echo and output.choice not in begun:
            begun.add(output.choice)
            text = tokenizer.decode(prompt.token_ids, False) + text
            if body.logprobs is not None:
                tokens.append(Token(prompt.token_ids[0]))
        tokens.extend(output.prompt_tokens)
        if output.token is not None and body.logprobs is not None:
            tokens.append(output.token)
        if text or output.finish is not None:
            logprobs = writers[output.choice].write(tokens) if tokens else None
            held[output.choice] = []
            choice = {"index": output.choice, "text": text, "logprobs": logprobs, "finish_reason": None}
            if output.finish is not None:
                choice |= {"finish_reason": FINISH_REASONS[output.finish], "stop_reason": output.stop}
            yield choice


async def collect(
    generation: Generation, body: CompletionRequest, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The same chunks as whole choices: of each prompt's candidates the n best, the likeliest first."""
    whole: dict[int, dict[str, Any]] = {}
    means = [Mean() for _ in generation.choices]
    prompts = [choice.prompt for choice in generation.choices]
    async for part in choices(measured(generation, means), prompts, body, tokenizer):
        entry = whole.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
        logprobs = entry["logprobs"]
        if part["logprobs"] is not None:
            before = logprobs or {name: [] for name in part["logprobs"]}
            logprobs = {name: before[name] + more for name, more in part["logprobs"].items()}
        entry |= part | {"text": entry["text"] + part["text"], "logprobs": logprobs}
    ranked = sorted(whole)
    if body.candidates > body.choices:
        ranked.sort(key=lambda index: (index // body.candidates, -means[index].value))
    kept = [index for place, index in enumerate(ranked) if place % body.candidates < body.choices]
    return [whole[index] | {"index": place} for place, index in enumerate(kept)]


class Mean:
    """The mean log-probability of one candidate's tokens: a sum would favour the shortest."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, token: Token) -> None:
        """One more token."""
        self._sum += token.logprob or 0.0
        self._count += 1

    @property
    def value(self) -> float:
        """So far; 0 without tokens."""
        return self._sum / max(self._count, 1)


async def measured(generation: Generation, means: Sequence[Mean]) -> AsyncIterator[TextOutput]:
    """The generation's outputs, whose log-probabilities are noted."""
    async for output in generation:
        if output.token is not None:
            means[output.choice].add(output.token)
        yield output


def make_router(service: Service) -> APIRouter:
    """The completions route."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    tokenizer = service.tokenizer
    described = answers(
        Completion, events=CompletionChunk, ending=", then `data: [DONE]`", errors=OPENAI_ERRORS
    )

    @router.post("/completions", responses=described)
    async def completions(request: HttpRequest, body: CompletionRequest) -> Response:
        """Continue prompts, as one answer or as a stream of chunks."""
        prompts = await read(body, service)
        generation = service.generate(prompts, request.state.caller)
        num_prompts = len(prompts) // body.candidates
        options = body.stream_options or StreamOptions()
        envelope = Envelope(
            "cmpl", "text_completion", service.model.name_with(prompts[0].adapter), num_prompts, options
        )
        if body.stream:
            parts = choices(aiter(generation), prompts, body, tokenizer)
            return EventStream(envelope.events(generation, parts), generation)
        answer = await unless_client_leaves(request, collect(generation, body, tokenizer))
        return JSONResponse(envelope.wrap(answer, usage=usage(generation, num_prompts)))

    return router
