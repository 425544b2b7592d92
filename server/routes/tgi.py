"""TGI's native API: /generate, /generate_stream and the compatible POST /.

Body -> Prompt and TextOutput -> event are pure functions; the contract is TGI 3.3's, its messages too.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from model.batch import SamplingParams, Token
from server.errors import VALIDATION, RequestError
from server.generation import Finish, Generation, Prompt, TextOutput
from server.routes.delivery import EventStream, event, unless_client_leaves
from server.routes.fields import MAX_STOP_SEQUENCES, Body, Number, Seed, Text, Unsupported
from server.service import Service
from server.text.tokenizer import Tokenizer

MAX_TOP_N_TOKENS = 5

FINISH_REASONS = {Finish.EOS: "eos_token", Finish.LENGTH: "length", Finish.STOP: "stop_sequence"}

NEUTRAL = {"best_of": (1,), "typical_p": (1, 1.0), "watermark": (False,), "grammar": (), "adapter_id": ()}
"""Fields that are known but not supported, with the values that ask for nothing."""


class Parameters(Body):
    """TGI's generation parameters, with ours beside them."""

    best_of: Unsupported = None
    temperature: Number | None = Field(None, description="0 is greedy")
    repetition_penalty: Number | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    top_k: int | None = None
    top_p: Number | None = None
    typical_p: Unsupported = None
    min_p: Number | None = None
    do_sample: bool | None = Field(
        None, description="default: whether a temperature, top_k, top_p or min_p was given"
    )
    max_new_tokens: int | None = Field(None, description="default: what fits")
    return_full_text: bool | None = None
    stop: Annotated[list[Text], Field(fail_fast=True)] = Field(
        default=[], description="the text ends with the first of these that appears in it"
    )
    truncate: int | None = Field(None, description="keep this many tokens of the end of the prompt")
    watermark: Unsupported = None
    details: bool = False
    decoder_input_details: bool = False
    seed: Seed | None = None
    top_n_tokens: int | None = None
    grammar: Unsupported = None
    adapter_id: Unsupported = None
    ignore_eos: bool = False


class GenerateRequest(Body):
    """The body of /generate and /generate_stream."""

    inputs: Text
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """The body of POST /."""

    stream: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A validated request, with what its answer needs to know."""

    prompt: Prompt
    prefix: str
    """What the generated text begins with: the prompt, if the full text was asked for."""
    details: bool
    prefill: bool
    seed: int | None


def check(parameters: Parameters, *, stream: bool) -> None:
    """Check what can be checked without the prompt, in TGI's words (RequestError)."""
    p = parameters
    p.refuse(NEUTRAL)
    checks = (
        (p.temperature is None or p.temperature >= 0, "`temperature` must be strictly positive"),
        (
            p.repetition_penalty is None or p.repetition_penalty > 0,
            "`repetition_penalty` must be strictly positive",
        ),
        (_within(p.frequency_penalty, -2, 2), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (_within(p.presence_penalty, -2, 2), "`presence_penalty` must be >= -2.0 and <= 2.0"),
        (p.top_k is None or p.top_k > 0, "`top_k` must be strictly positive"),
        (p.top_p is None or 0 < p.top_p <= 1, "`top_p` must be > 0.0 and < 1.0"),
        (_within(p.min_p, 0, 1), "`min_p` must be >= 0.0 and <= 1.0"),
        (p.max_new_tokens is None or p.max_new_tokens > 0, "`max_new_tokens` must be strictly positive"),
        (
            len(p.stop) <= MAX_STOP_SEQUENCES,
            f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(p.stop)}",
        ),
        (all(p.stop), "`stop` must not contain empty strings"),
        (
            _within(p.top_n_tokens, 0, MAX_TOP_N_TOKENS),
            f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_N_TOKENS}. Given: {p.top_n_tokens}",
        ),
        (
            not (stream and p.decoder_input_details),
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    )
    for holds, message in checks:
        if not holds:
            raise RequestError(VALIDATION, message)


def _within(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


def sampling_params(parameters: Parameters | None, seed: int) -> SamplingParams:
    """TGI's parameters as ours; without any it samples, as TGI does."""
    p = parameters or Parameters(do_sample=True)
    asked = bool(p.temperature) or any(value is not None for value in (p.top_k, p.top_p, p.min_p))
    sampling = p.do_sample if p.do_sample is not None else asked
    temperature = 1.0 if p.temperature is None else p.temperature
    return SamplingParams(
        temperature=temperature if sampling else 0.0,
        top_k=p.top_k or 0,
        top_p=p.top_p or 1.0,
        min_p=p.min_p or 0.0,
        repetition_penalty=p.repetition_penalty or 1.0,
        frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        seed=seed,
        logprobs=p.top_n_tokens or 0,  # the stream's events tell each token's log-probability
        prompt_logprobs=0 if p.decoder_input_details else None,
    )


async def read(body: GenerateRequest, service: Service, *, stream: bool, full_text: bool = False) -> Call:
    """Validate a body and encode its prompt (RequestError)."""
    p = body.parameters or Parameters()
    check(p, stream=stream)
    if not body.inputs:
        raise RequestError(VALIDATION, "`inputs` cannot be empty")
    limit = service.model.max_model_len
    if p.truncate is not None and not 0 < p.truncate < limit:
        message = f"`truncate` must be strictly positive and less than {limit}. Given: {p.truncate}"
        raise RequestError(VALIDATION, message)
    token_ids = await service.encode(body.inputs)
    if p.truncate is not None:
        token_ids = token_ids[-p.truncate :]
    count = len(token_ids)
    if not count:
        raise RequestError(VALIDATION, "`inputs` cannot be empty")
    if count >= limit:
        raise RequestError(VALIDATION, f"`inputs` must have less than {limit} tokens. Given: {count}")
    max_tokens = limit - count if p.max_new_tokens is None else p.max_new_tokens
    if count + max_tokens > limit:
        raise RequestError(
            VALIDATION,
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {count} `inputs` tokens and {max_tokens} `max_new_tokens`",
        )
    params = sampling_params(body.parameters, secrets.randbits(63) if p.seed is None else p.seed)
    wants_full = full_text if p.return_full_text is None else p.return_full_text
    return Call(
        prompt=Prompt(token_ids, params, max_tokens, tuple(p.stop), keep_stop=True, ignore_eos=p.ignore_eos),
        prefix=body.inputs if wants_full else "",
        details=p.details,
        prefill=p.decoder_input_details,
        seed=params.seed if params.temperature > 0 else None,
    )


def token_json(token: Token, text: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token; its text is what it completed in the stream, or its own if it is special."""
    special = tokenizer.is_special(token.id)
    shown = tokenizer.token_text(token.id) if special or text is None else text
    return {"id": token.id, "text": shown, "logprob": token.logprob, "special": special}


def top_tokens_json(token: Token, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The most likely tokens at a token's place."""
    return [token_json(Token(id, logprob), None, tokenizer) for id, logprob in token.top]


def prefill_json(
    prompt_ids: Sequence[int], scored: Sequence[Token], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The prompt's tokens; nothing predicts the first."""
    tokens = [Token(prompt_ids[0]), *scored]
    return [{"id": t.id, "text": tokenizer.token_text(t.id), "logprob": t.logprob} for t in tokens]


async def events(call: Call, generation: Generation, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
    """One event a token; the last one carries the whole text."""
    text = call.prefix
    try:
        async for output in generation:
            assert output.token is not None
            text += output.text
            data: dict[str, Any] = {
                "index": generation.output_tokens,
                "token": token_json(output.token, output.text, tokenizer),
                "generated_text": None if output.finish is None else text,
                "details": None,
            }
            if output.token.top:
                data["top_tokens"] = top_tokens_json(output.token, tokenizer)
            if output.finish is not None and call.details:
                data["details"] = {
                    "finish_reason": FINISH_REASONS[output.finish],
                    "generated_tokens": generation.output_tokens,
                    "seed": call.seed,
                    "input_length": generation.prompt_tokens,
                }
            yield event(data)
    except RequestError as error:
        yield event(error.native_body())


async def collect(call: Call, generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same outputs as one answer."""
    outputs: list[TextOutput] = [output async for output in generation]
    answer: dict[str, Any] = {"generated_text": call.prefix + "".join(output.text for output in outputs)}
    if not (call.details or call.prefill):
        return answer
    finish = outputs[-1].finish
    assert finish is not None
    scored = [token for output in outputs for token in output.prompt_tokens]
    tokens = [(output.token, output.text) for output in outputs if output.token is not None]
    details: dict[str, Any] = {
        "finish_reason": FINISH_REASONS[finish],
        "generated_tokens": generation.output_tokens,
        "seed": call.seed,
        "prefill": prefill_json(call.prompt.token_ids, scored, tokenizer) if call.prefill else [],
        "tokens": [token_json(token, text, tokenizer) for token, text in tokens],
    }
    if call.prompt.params.logprobs:
        details["top_tokens"] = [top_tokens_json(token, tokenizer) for token, _ in tokens]
    return answer | {"details": details}


def make_router(service: Service) -> APIRouter:
    """The native routes."""
    router = APIRouter(tags=["text-generation-inference"])
    tokenizer = service.tokenizer

    def stream(call: Call) -> EventStream:
        generation = service.generate([call.prompt])
        return EventStream(events(call, generation, tokenizer), generation)

    async def answer(request: HttpRequest, call: Call) -> dict[str, Any]:
        generation = service.generate([call.prompt])
        return await unless_client_leaves(request, collect(call, generation, tokenizer))

    @router.post("/generate")
    async def generate(request: HttpRequest, body: GenerateRequest) -> Response:
        """Continue a prompt; one answer."""
        return JSONResponse(await answer(request, await read(body, service, stream=False)))

    @router.post("/generate_stream")
    async def generate_stream(body: GenerateRequest) -> Response:
        """Continue a prompt; one event a token."""
        return stream(await read(body, service, stream=True))

    @router.post("/")
    async def compatible(request: HttpRequest, body: CompatRequest) -> Response:
        """/generate_stream if `stream` is set, else /generate in a list."""
        call = await read(body, service, stream=body.stream, full_text=True)
        return stream(call) if body.stream else JSONResponse([await answer(request, call)])

    return router
