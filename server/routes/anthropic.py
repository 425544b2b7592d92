"""Anthropic's /v1/messages: messages of blocks in, one such message or its events out."""

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from server.conversation import Turn
from server.generation import Generation, Prompt
from server.routes.anthropic_answers import AnthropicError, MessageAnswer, MessageEvent
from server.routes.anthropic_events import MessageWriter
from server.routes.anthropic_fields import MessagesRequest
from server.routes.delivery import EventStream, unless_client_leaves
from server.routes.described import OPENAI_ERRORS, answers
from server.routes.openai_fields import check_length
from server.service import Service


async def read(body: MessagesRequest, service: Service) -> tuple[Turn, list[Prompt]]:
    """Validate a body and encode its conversation (RequestError)."""
    body.check(service.model)
    turn = await body.conversation(service, body.structure()).turn(service)
    fields = ("messages", "max_tokens")
    length = check_length(len(turn.token_ids), body.max_tokens, None, service.model.max_model_len, fields)
    return turn, body.prompts(turn.token_ids, length, service, count=1, logprobs=None, grammar=turn.grammar)


async def collect(writer: MessageWriter) -> Response:
    """The message that all events make."""
    async for _ in writer.events():
        pass
    return JSONResponse(writer.message())


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", tags=["anthropic"])
    described = answers(MessageAnswer, events=MessageEvent, errors=OPENAI_ERRORS, error=AnthropicError)

    @router.post("/messages", responses=described)
    async def messages(request: HttpRequest, body: MessagesRequest) -> Response:
        """Answer a conversation, as one message or as a stream of its events."""
        turn, prompts = await read(body, service)
        generation: Generation = service.generate(prompts, request.state.caller)
        writer = MessageWriter(service.model.name_with(prompts[0].adapter), turn, generation)
        if body.stream:
            return EventStream(writer.stream(), generation)
        return await unless_client_leaves(request, collect(writer))

    return router
