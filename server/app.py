"""create_app: the routes, the middleware and the error answers around one Service."""

import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from server.config import ServeSettings
from server.edge.identity import CallerMiddleware
from server.edge.limits import BodyLimit
from server.errors import (
    GENERATION,
    INTERNAL,
    METHOD,
    NOT_FOUND,
    VALIDATION,
    RequestError,
    error_response,
)
from server.routes import (
    anthropic,
    anthropic_count,
    chat,
    completions,
    described,
    openai,
    ops,
    responses,
    tgi,
)
from server.routes.delivery import ClientLeft
from server.service import Service

logger = logging.getLogger("rivulet.app")

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it
SHOWN_FAULTS = 3


def create_app(service: Service, settings: ServeSettings) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        service.metrics.watch(lambda: service.engine.stats)
        try:
            yield
        finally:
            await service.engine.stop()

    app = FastAPI(
        title="Rivulet",
        description="Text generation in the dialects of TGI, OpenAI and Anthropic.",
        version=version("rivulet"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    described.describe(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(CallerMiddleware)  # the last one added is the outermost

    async def receive(request: Request) -> None:
        """A call of a route that generates; what it is counted by."""
        request.state.generates = True
        service.metrics.tgi.count_request()

    def refuse(request: Request, error: RequestError) -> Response:
        # What fails later than this is counted by its Generation, in streams too.
        if hasattr(request.state, "generates") and error.kind is not GENERATION:
            service.metrics.tgi.count_failure(error.kind.native_type.removesuffix("_error"))
        return error_response(error, request.scope["path"])

    for routes in (tgi, completions, chat, responses, anthropic):
        app.include_router(routes.make_router(service), dependencies=[Depends(receive)])
    for routes in (openai, anthropic_count, ops):
        app.include_router(routes.make_router(service))
    app.include_router(described.make_router())

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return refuse(request, explain(error.errors(), media_type))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kinds = {404: NOT_FOUND, 405: METHOD}
        texts = {404: "there is nothing at this path", 405: "this path does not take that method"}
        text = texts.get(error.status_code, "the body is not valid JSON")  # what FastAPI could not parse
        response = error_response(
            RequestError(kinds.get(error.status_code, VALIDATION), text), request.scope["path"]
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return error_response(RequestError(INTERNAL, "internal error"), request.scope["path"])

    return app


def explain(faults: Any, media_type: str) -> RequestError:
    """Pydantic's findings as one message that names fields and never repeats the input."""
    if media_type != "application/json" and not media_type.endswith("+json"):
        return RequestError(
            VALIDATION, "send the body as JSON, with the header Content-Type: application/json"
        )
    messages: dict[str, str] = {}  # by place; of a union's many findings at one place the first is enough
    for item in faults:
        if item["type"] == "json_invalid":
            return RequestError(VALIDATION, "the body is not valid JSON")
        messages.setdefault(_place(item["loc"]), item["msg"])
    shown = [f"`{place}`: {text}" if place else f"the body: {text}" for place, text in messages.items()]
    if len(shown) > SHOWN_FAULTS:
        shown[SHOWN_FAULTS:] = [f"and {len(shown) - SHOWN_FAULTS} more"]
    return RequestError(VALIDATION, "; ".join(shown), param=next(iter(messages)) or None)


def _place(loc: tuple[int | str, ...]) -> str:
    """A dotted path of fields and indices, without pydantic's names for the branches of a union."""
    fields = [str(part) for part in loc[1:]]  # after "body"
    return ".".join(itertools.takewhile(_is_field, fields))


def _is_field(part: str) -> bool:
    """Ours are in lower case; a branch is named by its class or by its whole type."""
    return part.isdigit() or (part.isidentifier() and part.islower())
