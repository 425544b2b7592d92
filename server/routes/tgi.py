"""TGI's native API: /generate, /generate_stream and the compatible POST /.

Body -> Prompts and TextOutput -> event are pure functions; the contract is TGI 3.3's, its messages too.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from model.batch import Token
from server.errors import VALIDATION, RequestError
from server.generation import Finish, Generation, Prompt, TextOutput
from server.metrics_tgi import Timings
from server.routes.delivery import EventStream, event, unless_client_leaves
from server.routes.described import NATIVE_ERRORS, NativeError, answers
from server.routes.fields import check_stop_token_ids
from server.routes.tgi_answers import CompatAnswer, GenerateAnswer, StreamEvent
from server.routes.tgi_schema import (
    CompatRequest,
    GenerateRequest,
    GrammarField,
    Parameters,
    check,
    invalid_grammar,
    read_grammar,
    sampling_params,
)
from server.service import ModelInfo, Service
from server.text.grammar import Grammar
from server.text.tokenizer import Tokenizer

FINISH_REASONS = {Finish.EOS: "eos_token", Finish.LENGTH: "length", Finish.STOP: "stop_sequence"}


@dataclass(frozen=True, slots=True)
class Call:
    """A validated request, with what its answer needs to know."""

    prompts: tuple[Prompt, ...]
    """The same prompt once for each candidate; only the first asks for the prompt's log-probabilities."""
    prefix: str
    """What the generated text begins with: the prompt, if the full text was asked for."""
    characters: int
    """Of the text that was sent."""
    details: bool
    prefill: bool


async def read(body: GenerateRequest, service: Service, *, stream: bool, full_text: bool = False) -> Call:
    """Validate a body and encode its prompt (RequestError)."""
    p = body.parameters or Parameters(do_sample=True)  # without any it samples, as TGI does
    check(p, service.limits, stream=stream)
    vocab_size = service.tokenizer.vocab_size
    stop_token_ids = check_stop_token_ids(p.stop_token_ids, vocab_size)
    token_ids = await encode(body.inputs, p.truncate, service)
    max_tokens = read_max_tokens(p.max_new_tokens, len(token_ids), service.model.max_model_len)
    params = sampling_params(p, vocab_size, max_tokens, secrets.randbits(63) if p.seed is None else p.seed)
    prompt = Prompt(
        token_ids,
        params,
        max_tokens,
        tuple(p.stop),
        keep_stop=True,
        ignore_eos=p.ignore_eos,
        stop_token_ids=stop_token_ids,
        grammar=None if p.grammar is None else await compile_grammar(p.grammar, service),
        adapter=0 if p.adapter_id is None else read_adapter(p.adapter_id, service.model),
    )
    others = [
        replace(prompt, params=replace(params, seed=params.seed + candidate, prompt_logprobs=None))
        for candidate in range(1, p.best_of or 1)
    ]
    wants_full = full_text if p.return_full_text is None else p.return_full_text
    return Call(
        prompts=(prompt, *others),
        prefix=body.inputs if wants_full else "",
        characters=len(body.inputs),
        details=p.details,
        prefill=p.decoder_input_details,
    )


async def encode(inputs: str, truncate: int | None, service: Service) -> tuple[int, ...]:
    """The prompt's token ids, the last `truncate` of them if that is given (RequestError)."""
    limit = service.model.max_model_len
    if not inputs:
        raise RequestError(VALIDATION, "`inputs` cannot be empty")
    if truncate is not None and not 0 < truncate < limit:
        message = f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}"
        raise RequestError(VALIDATION, message)
    token_ids = await service.encode(inputs)
    if truncate is not None:
        token_ids = token_ids[-truncate:]
    if not token_ids:
        raise RequestError(VALIDATION, "`inputs` cannot be empty")
    if len(token_ids) >= limit:
        message = f"`inputs` must have less than {limit} tokens. Given: {len(token_ids)}"
        raise RequestError(VALIDATION, message)
    return token_ids


def read_max_tokens(max_new_tokens: int | None, count: int, limit: int) -> int:
    """Output tokens at most, by default what fits behind `count` tokens (RequestError)."""
    max_tokens = limit - count if max_new_tokens is None else max_new_tokens
    if count + max_tokens > limit:
        raise RequestError(
            VALIDATION,
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {count} `inputs` tokens and {max_tokens} `max_new_tokens`",
        )
    return max_tokens


def read_adapter(adapter_id: str, model: ModelInfo) -> int:
    """An adapter's number (RequestError)."""
    adapter = model.adapter(adapter_id)
    if adapter is None:
        loaded = ", ".join(f"`{name}`" for name in model.adapters) or "none"
        raise RequestError(VALIDATION, f"`adapter_id` names no adapter of this server. Loaded: {loaded}")
    return adapter


async def compile_grammar(field: GrammarField, service: Service) -> Grammar:
    """What the text must match (RequestError)."""
    spec = read_grammar(field)
    try:
        return await service.compile(spec, "grammar")
    except RequestError as error:
        raise invalid_grammar(error.message) from None


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


def told_seed(prompt: Prompt) -> int | None:
    """The seed, if it had a part in the text."""
    return prompt.params.seed if prompt.params.temperature > 0 else None


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
                    "seed": told_seed(call.prompts[0]),
                    "input_length": generation.prompt_tokens,
                }
            yield event(data)
    except RequestError as error:
        yield event(error.native_body())


@dataclass(frozen=True, slots=True)
class Candidate:
    """One finished continuation of the prompt."""

    prompt: Prompt
    text: str
    finish: Finish
    tokens: tuple[tuple[Token, str], ...]
    """Each token, and the text that it completed."""

    @property
    def mean_logprob(self) -> float:
        """By this TGI compares candidates (generate_best_of): a sum would favour the shortest."""
        return sum(token.logprob or 0.0 for token, _ in self.tokens) / max(len(self.tokens), 1)

    def details(self, prefill: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
        """What TGI tells of it beside the text."""
        return {
            "finish_reason": FINISH_REASONS[self.finish],
            "generated_tokens": len(self.tokens),
            "seed": told_seed(self.prompt),
            "prefill": prefill,
            "tokens": [token_json(token, text, tokenizer) for token, text in self.tokens],
        }

    def top_tokens(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The field of that name, if it was asked for."""
        if not self.prompt.params.logprobs:
            return {}
        return {"top_tokens": [top_tokens_json(token, tokenizer) for token, _ in self.tokens]}


def read_candidate(prompt: Prompt, prefix: str, outputs: Sequence[TextOutput]) -> Candidate:
    """A candidate's outputs as a whole."""
    finish = outputs[-1].finish
    assert finish is not None
    tokens = tuple((output.token, output.text) for output in outputs if output.token is not None)
    return Candidate(prompt, prefix + "".join(output.text for output in outputs), finish, tokens)


async def collect(
    call: Call, generation: Generation, tokenizer: Tokenizer
) -> tuple[dict[str, Any], Candidate]:
    """The same outputs as one answer, and the candidate that it gives: the likeliest per token."""
    outputs: list[list[TextOutput]] = [[] for _ in call.prompts]
    async for output in generation:
        outputs[output.choice].append(output)
    candidates = [
        read_candidate(prompt, call.prefix, mine) for prompt, mine in zip(call.prompts, outputs, strict=True)
    ]
    best = max(candidates, key=lambda candidate: candidate.mean_logprob)
    answer: dict[str, Any] = {"generated_text": best.text}
    if call.details or call.prefill:
        prefill: list[dict[str, Any]] = []
        if call.prefill:
            scored = [token for output in outputs[0] for token in output.prompt_tokens]
            prefill = prefill_json(call.prompts[0].token_ids, scored, tokenizer)
        details = best.details(prefill, tokenizer)
        if len(candidates) > 1:
            details["best_of_sequences"] = [
                {"generated_text": other.text}
                | other.details(prefill, tokenizer)
                | other.top_tokens(tokenizer)
                for other in candidates
                if other is not best
            ]
        answer["details"] = details | best.top_tokens(tokenizer)
    return answer, best


def headers(call: Call, device: str, best: Candidate, timings: Timings) -> dict[str, str]:
    """TGI's headers of an answer; times are whole milliseconds but for the first, in seconds."""
    per_token = timings.inference / max(len(best.tokens), 1)
    times = {
        "x-total-time": timings.total,
        "x-validation-time": timings.validation,
        "x-queue-time": timings.queue,
        "x-inference-time": timings.inference,
        "x-time-per-token": per_token,
    }
    return {
        **stream_headers(call, device),
        "x-compute-time": f"{timings.total:.6f}",
        **{name: str(int(seconds * 1000)) for name, seconds in times.items()},
        "x-prompt-tokens": str(len(call.prompts[0].token_ids)),
        "x-generated-tokens": str(len(best.tokens)),
    }


def stream_headers(call: Call, device: str) -> dict[str, str]:
    """What is known before the first token."""
    kind = "gpu" if device == "cuda" else device
    return {"x-compute-type": f"{kind}+optimized", "x-compute-characters": str(call.characters)}


def make_router(service: Service) -> APIRouter:
    """The native routes."""
    router = APIRouter(tags=["text-generation-inference"])
    tokenizer, device = service.tokenizer, service.model.device

    def stream(request: HttpRequest, call: Call) -> Response:
        generation = service.generate(call.prompts, request.state.caller)
        response = EventStream(events(call, generation, tokenizer), generation)
        response.headers.update(stream_headers(call, device))
        return response

    async def answer(request: HttpRequest, call: Call, *, as_list: bool = False) -> Response:
        generation = service.generate(call.prompts, request.state.caller)
        data, best = await unless_client_leaves(request, collect(call, generation, tokenizer))
        return JSONResponse(
            [data] if as_list else data, headers=headers(call, device, best, generation.timings)
        )

    @router.post("/generate", responses=answers(GenerateAnswer, errors=NATIVE_ERRORS, error=NativeError))
    async def generate(request: HttpRequest, body: GenerateRequest) -> Response:
        """Continue a prompt; one answer."""
        return await answer(request, await read(body, service, stream=False))

    @router.post(
        "/generate_stream",
        responses=answers(None, events=StreamEvent, errors=NATIVE_ERRORS, error=NativeError),
    )
    async def generate_stream(request: HttpRequest, body: GenerateRequest) -> Response:
        """Continue a prompt; one event a token."""
        return stream(request, await read(body, service, stream=True))

    @router.post(
        "/",
        responses=answers(CompatAnswer, events=StreamEvent, errors=NATIVE_ERRORS, error=NativeError),
    )
    async def compatible(request: HttpRequest, body: CompatRequest) -> Response:
        """/generate_stream if `stream` is set, else /generate in a list."""
        call = await read(body, service, stream=body.stream, full_text=True)
        return stream(request, call) if body.stream else await answer(request, call, as_list=True)

    return router
