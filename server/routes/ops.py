"""What is asked of the server rather than of the model: health, readiness, info, metrics, tokens."""

import asyncio
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field

from server.errors import UNAVAILABLE, VALIDATION, RequestError
from server.routes.fields import MAX_STOP_SEQUENCES, Body, Text
from server.routes.messages import Message, plain_messages
from server.routes.tgi import MAX_TOP_N_TOKENS
from server.service import Service


class TokenizeRequest(Body):
    """TGI's body (`inputs`), or vLLM's (`prompt` or `messages`)."""

    inputs: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """Token ids to turn into text."""

    tokens: Annotated[list[int], Field(fail_fast=True)]


def make_router(service: Service) -> APIRouter:
    """The routes that generate nothing."""
    router = APIRouter(tags=["server"])
    tokenizer, model = service.tokenizer, service.model

    @router.get("/health")
    async def health() -> Response:
        """Whether the engine lives: 200, or 503 once it has ended."""
        if service.engine.alive:
            return Response()
        return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)

    @router.get("/ready")
    async def ready() -> Response:
        """Whether requests are served now."""
        if not service.engine.alive:
            raise RequestError(UNAVAILABLE, "the engine is not running")
        return JSONResponse({"status": "ready"})

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """TGI's description of the server, with ours beside it."""
        return {
            "model_id": model.name,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": model.max_running + model.max_waiting,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_top_n_tokens": MAX_TOP_N_TOKENS,
            "max_input_tokens": model.max_model_len - 1,
            "max_total_tokens": model.max_model_len,
            "max_client_batch_size": 1,
            "router": "rivulet",
            "version": version("rivulet"),
            "model_dtype": model.dtype,
            "model_device_type": model.device,
            "kernels": model.kernels,
            "kv_cache_tokens": model.cache_tokens,
            "logprobs": "of the model's own distribution, before penalties, temperature and cuts",
        }

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """A text's tokens, in the form of whoever's body it was."""
        given = [name for name in ("inputs", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise RequestError(VALIDATION, "give one of `inputs`, `prompt` and `messages`")
        if body.inputs is not None:
            tokens = await asyncio.to_thread(tokenizer.encode_with_offsets, body.inputs)
            return JSONResponse(
                [{"id": i, "text": body.inputs[a:b], "start": a, "stop": b} for i, a, b in tokens]
            )
        if body.messages is not None:
            ids = await service.encode_chat(plain_messages(body.messages))
        else:
            ids = await service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return JSONResponse({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special ones included."""
        if not all(0 <= token < tokenizer.vocab_size for token in body.tokens):
            raise RequestError(VALIDATION, f"`tokens` must be at least 0 and below {tokenizer.vocab_size}")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
        return JSONResponse({"prompt": text})

    return router
