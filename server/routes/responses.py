"""OpenAI's /v1/responses: items in, items or typed events out. Nothing is kept from one call to the next."""

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from server.conversation import Turn
from server.errors import RequestError
from server.generation import Generation, Prompt
from server.routes.delivery import EventStream, unless_client_leaves
from server.routes.described import OPENAI_ERRORS, answers
from server.routes.openai_fields import check_length
from server.routes.responses_answers import ResponseEvent, ResponseObject
from server.routes.responses_events import ResponseWriter, echo
from server.routes.responses_fields import ResponseRequest
from server.service import Service


async def read(body: ResponseRequest, service: Service) -> tuple[Turn, list[Prompt]]:
    """Validate a body and encode its conversation (RequestError)."""
    body.check(service.model)
    conversation = body.to_conversation()
    try:
        turn = await conversation.turn(service)
    except RequestError as error:
        if error.param == "messages":  # which are made of it
            error.param = "input"
        raise
    fields = ("input", "max_output_tokens")
    limit = service.model.max_model_len
    length = check_length(len(turn.token_ids), body.max_output_tokens, None, limit, fields)
    return turn, body.prompts(turn.token_ids, length, service, count=1, logprobs=None, grammar=turn.grammar)


async def collect(writer: ResponseWriter, generation: Generation) -> Response:
    """The answer that the last event holds."""
    last = {}
    async for event in writer.events(generation):
        last = event
    return JSONResponse(last["response"])


def make_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    described = answers(ResponseObject, events=ResponseEvent, errors=OPENAI_ERRORS)

    @router.post("/responses", responses=described)
    async def responses(request: HttpRequest, body: ResponseRequest) -> Response:
        """Answer an input, as one response or as a stream of typed events."""
        turn, prompts = await read(body, service)
        writer = ResponseWriter(service.model.name_with(prompts[0].adapter), echo(body, turn), turn)
        generation = service.generate(prompts, request.state.caller)
        if body.stream:
            return EventStream(writer.stream(generation), generation)
        return await unless_client_leaves(request, collect(writer, generation))

    return router
