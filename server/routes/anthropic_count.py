"""Anthropic's /v1/messages/count_tokens: how many tokens a conversation has; the model computes nothing."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.routes.anthropic_answers import AnthropicError, TokenCount
from server.routes.anthropic_fields import CountRequest
from server.routes.described import answers
from server.service import Service


def make_router(service: Service) -> APIRouter:
    """The route; no call of it generates."""
    router = APIRouter(prefix="/v1", tags=["anthropic"])

    @router.post(
        "/messages/count_tokens",
        responses=answers(TokenCount, errors=(400, 404, 413, 500), error=AnthropicError),
    )
    async def count_tokens(body: CountRequest) -> Response:
        """Count a conversation's tokens, its tools included."""
        body.check(service.model)
        turn = await body.conversation(service).turn(service)
        return JSONResponse({"input_tokens": len(turn.token_ids)})

    return router
