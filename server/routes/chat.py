"""OpenAI's /v1/chat/completions: messages in, deltas or one message out."""

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
from server.routes.messages import Message, plain_messages
from server.routes.openai import (
    FINISH_REASONS,
    MAX_TOP_LOGPROBS,
    Envelope,
    SamplingFields,
    StreamOptions,
    check_length,
    usage,
)
from server.service import Service
from server.text.tokenizer import Tokenizer

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "parallel_tool_calls": (True, False),
}
"""Fields that are known but not supported, with the values that ask for nothing."""


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="default: what fits")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="older name of the same")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    response_format: Unsupported = None
    modalities: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    parallel_tool_calls: Unsupported = None


async def read(body: ChatRequest, service: Service) -> list[Prompt]:
    """Validate a body and encode its conversation: one prompt a choice (RequestError)."""
    body.check(service.model)
    body.refuse(NEUTRAL)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(VALIDATION, "`top_logprobs` needs `logprobs`", param="top_logprobs")
    token_ids = await service.encode_chat(plain_messages(body.messages))
    if not token_ids:
        raise RequestError(VALIDATION, "the messages make an empty prompt", param="messages")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = service.model.max_model_len
    max_tokens = check_length(len(token_ids), getattr(body, name), None, limit, ("messages", name))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [
        Prompt(token_ids, params, max_tokens, body.stops, ignore_eos=body.ignore_eos)
        for params in body.sampling_params(logprobs)
    ]


def logprobs_json(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """Chat's form of log-probabilities."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(id, value) for id, value in token.top]}
            for token in tokens
        ]
    }


def choice_json(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One choice of a chunk."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


async def choices(generation: Generation, tokenizer: Tokenizer) -> AsyncIterator[dict[str, Any]]:
    """The chunks' choices: the role at first, then text, then an empty delta with the reason."""
    held: dict[int, list[Token]] = {}  # tokens whose text or log-probability was not sent yet
    async for output in generation:
        if output.index not in held:
            held[output.index] = []
            yield choice_json(output.index, {"role": "assistant", "content": ""})
        if output.token is not None and output.token.logprob is not None:
            held[output.index].append(output.token)
        if output.text or (output.finish is not None and held[output.index]):
            choice = choice_json(output.index, {"content": output.text})
            if held[output.index]:
                choice["logprobs"] = logprobs_json(held[output.index], tokenizer)
                held[output.index] = []
            yield choice
        if output.finish is not None:
            yield choice_json(output.index, {}, FINISH_REASONS[output.finish])


async def collect(generation: Generation, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The same chunks as whole choices."""
    whole: dict[int, dict[str, Any]] = {}
    async for choice in choices(generation, tokenizer):
        index = choice["index"]
        if index not in whole:
            message = {"role": "assistant", "content": ""}
            whole[index] = {"index": index, "message": message, "logprobs": None, "finish_reason": None}
        entry = whole[index]
        entry["message"]["content"] += choice["delta"].get("content", "")
        entry["finish_reason"] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            content = (entry["logprobs"] or {"content": []})["content"] + choice["logprobs"]["content"]
            entry["logprobs"] = {"content": content}
    return [whole[index] for index in sorted(whole)]


def make_router(service: Service) -> APIRouter:
    """The chat route."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    tokenizer = service.tokenizer

    @router.post("/chat/completions")
    async def chat_completions(request: HttpRequest, body: ChatRequest) -> Response:
        """Answer a conversation, as one message or as a stream of deltas."""
        prompts = await read(body, service)
        generation = service.generate(prompts)
        options = body.stream_options or StreamOptions()
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        envelope = Envelope("chatcmpl", kind, service.model.name, 1, options)
        if body.stream:
            return EventStream(envelope.events(generation, choices(generation, tokenizer)), generation)
        answer = await unless_client_leaves(request, collect(generation, tokenizer))
        return JSONResponse(envelope.wrap(answer, usage=usage(generation, 1)))

    return router
