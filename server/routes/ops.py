"""What is asked of the server rather than of the model: health, readiness, info, metrics, tokens."""

import asyncio
import json
import os
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from server.edge.gate import health_answer, ready_answer
from server.edge.lifecycle import Condition, Lifecycle, State
from server.errors import VALIDATION, RequestError
from server.routes.completions import MAX_PROMPTS
from server.routes.described import NativeError, answers
from server.routes.fields import Body, Text, Unsupported
from server.routes.messages import Messages, plain_messages
from server.routes.tgi_answers import (
    ChatTokens,
    DetokenizedText,
    Info,
    NotReady,
    Readiness,
    Tokens,
    Unhealthy,
)
from server.service import Service
from server.text.tokenizer import Tokenizer

JSON = "application/json"
REFUSED = (413, 422)
DOWN = (503,)


class TokenizeRequest(Body):
    """TGI's body (`inputs`), or vLLM's (`prompt` or `messages`)."""

    inputs: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="default: true for a text; a chat template writes its own"
    )
    return_token_strs: bool | None = Field(None, description="vLLM's body only")


class ChatTokenizeRequest(Body):
    """A conversation, to see what the model is given."""

    messages: Messages
    tools: Unsupported = None


class DetokenizeRequest(Body):
    """Token ids to turn into text."""

    tokens: Annotated[list[int], Field(fail_fast=True)]


def make_router(service: Service, lifecycle: Lifecycle) -> APIRouter:
    """The routes that generate nothing."""
    router = APIRouter(tags=["server"])
    tokenizer, model = service.tokenizer, service.model

    alive = answers(None, errors=DOWN, error=Unhealthy, description="Healthy; no body.")

    @router.get("/", responses=alive)
    @router.get("/health", responses=alive)
    @router.get("/ping", responses=alive)
    async def health() -> Response:
        """Whether the process does its work, also while it drains; if not, it is to be started again.

        After a step that failed for everyone it tries one token before it says so.
        """
        present = condition()
        if present.state is State.READY and not await service.engine.probe():
            present = Condition(State.FAILED, "the model fails")
        return health_answer(present)

    @router.get("/ready", responses=answers(Readiness, errors=DOWN, error=NotReady))
    async def ready() -> Response:
        """Whether requests are served now; if not, why."""
        return ready_answer(condition())

    def condition() -> Condition:
        """The process's, unless its engine was stopped under it."""
        present = lifecycle.condition
        if present.state is State.READY and not service.engine.alive:
            return Condition(State.FAILED, "the engine is not running")
        return present

    @router.get("/info", responses=answers(Info))
    async def info() -> Response:
        """TGI's description of the server, with ours beside it."""
        return JSONResponse(describe(service))

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize", responses=answers(Tokens, errors=REFUSED, error=NativeError))
    async def tokenize(body: TokenizeRequest) -> Response:
        """A text's tokens, in the form of whoever's body it was."""
        given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise RequestError(VALIDATION, "give one of `inputs`, `prompt` and `messages`")
        special = body.add_special_tokens is not False
        if body.inputs is not None:
            if body.return_token_strs:
                raise RequestError(VALIDATION, "`return_token_strs` goes with `prompt` or `messages`")
            return Response(await tokens_json(body.inputs, tokenizer, special), media_type=JSON)
        if body.messages is not None:
            if body.add_special_tokens:
                raise RequestError(VALIDATION, "`add_special_tokens` goes with `inputs` or `prompt`")
            ids = await service.encode_chat(plain_messages(body.messages))
        else:
            ids = await service.encode(body.prompt or "", add_special_tokens=special)
        texts = [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        counts = {"count": len(ids), "max_model_len": model.max_model_len}
        return JSONResponse(counts | {"tokens": ids, "token_strs": texts})

    @router.post("/chat_tokenize", responses=answers(ChatTokens, errors=REFUSED, error=NativeError))
    async def chat_tokenize(body: ChatTokenizeRequest) -> Response:
        """A conversation in the model's template, as text and as tokens."""
        body.refuse({"tools": ([],)})
        text = await service.render_chat(plain_messages(body.messages))
        tokens = await tokens_json(text, tokenizer, False)
        templated = await asyncio.to_thread(json.dumps, text)
        answer = b'{"tokenize_response":%b,"templated_text":%b}' % (tokens, templated.encode())
        return Response(answer, media_type=JSON)

    @router.post("/detokenize", responses=answers(DetokenizedText, errors=REFUSED, error=NativeError))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special ones included."""
        if not all(0 <= token < tokenizer.vocab_size for token in body.tokens):
            raise RequestError(VALIDATION, f"`tokens` must be at least 0 and below {tokenizer.vocab_size}")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    return router


async def tokens_json(text: str, tokenizer: Tokenizer, special: bool) -> bytes:
    """A text's tokens in TGI's form, made in a thread; start and stop count characters."""
    return await asyncio.to_thread(_tokens_json, text, tokenizer, special)


def _tokens_json(text: str, tokenizer: Tokenizer, special: bool) -> bytes:
    """In parts, for one call of json is not interrupted: millions of tokens would hold the event loop too."""
    tokens = [
        json.dumps({"id": i, "text": text[a:b], "start": a, "stop": b}, separators=(",", ":"))
        for i, a, b in tokenizer.encode_with_offsets(text, special)
    ]
    return f"[{','.join(tokens)}]".encode()


def describe(service: Service) -> dict[str, Any]:
    """TGI's /info, with ours after it."""
    model, limits = service.model, service.limits
    return {
        "model_id": model.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": model.max_running + model.max_waiting,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": model.max_model_len - 1,
        "max_total_tokens": model.max_model_len,
        # Texts are encoded in asyncio's threads; this is how many it makes at most.
        "validation_workers": min(32, (os.cpu_count() or 1) + 4),
        "max_client_batch_size": MAX_PROMPTS,
        "router": "rivulet",
        "version": version("rivulet"),
        "sha": None,
        "docker_label": None,
        "max_top_n_tokens": limits.max_top_n_tokens,
        "model_dtype": model.dtype,
        "model_device_type": model.device,
        "kernels": model.kernels,
        "kv_cache_tokens": model.cache_tokens,
        "logprobs": "of the model's own distribution, before penalties, temperature and cuts",
    }
