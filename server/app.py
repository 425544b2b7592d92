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
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware

from server.config import ServeSettings
from server.edge.access import Keyring, cross_origin, guards
from server.edge.lifecycle import Lifecycle
from server.edge.limits import NOT_JSON, BodyLimit
from server.errors import (
    INTERNAL,
    METHOD,
    NOT_FOUND,
    VALIDATION,
    RequestError,
    error_response,
)
from server.generation import Failure
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


def warm_up(app: FastAPI) -> None:
    """Have FastAPI build what it needs of each route, which else the first client waits for: 0.1 s."""
    for route in app.router.routes:
        route.matches({"type": "http", "method": "GET", "path": "", "root_path": "", "headers": []})


def create_app(service: Service, settings: ServeSettings, lifecycle: Lifecycle) -> FastAPI:
    """The application; its lifespan starts and stops the engine."""
    traces = None
    if settings.otlp_endpoint is not None:
        from server.edge.tracing import Traces, Tracing  # their packages are an extra

        traces = Traces(settings.otlp_endpoint, service.model.name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        service.metrics.watch(service.engine)
        try:
            yield
        finally:
            await service.engine.stop()
            if traces is not None:
                await traces.close()

    keys = Keyring.read(settings)
    app = FastAPI(
        title="Rivulet",
        description="Text generation in the dialects of TGI, OpenAI and Anthropic.",
        version=version("rivulet"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # would send a client to whatever its Host header says
        middleware=[  # the outermost first
            *([] if traces is None else [Middleware(Tracing, traces=traces)]),
            *cross_origin(settings.cors_origins),
            Middleware(ServerErrorMiddleware, handler=fault),
            *guards(settings, keys, service.metrics.count_rejection),
            Middleware(BodyLimit, max_bytes=settings.max_body_bytes, refused=service.metrics.count_rejection),
        ],
    )
    app.state.metrics = service.metrics  # the server around it has its own to tell
    described.describe(app, keys=bool(keys.owners))

    async def receive(request: Request) -> None:
        """A call of a route that generates: count it, and refuse it at once where there is no place."""
        request.state.generates = True
        service.metrics.tgi.count_request()
        service.check_room(request.state.caller.client)

    def refuse(request: Request, error: RequestError) -> Response:
        # A Failure is counted by its Generation, in streams too.
        if not isinstance(error, Failure):
            service.metrics.count_rejection(error.kind)
            if hasattr(request.state, "generates"):
                service.metrics.tgi.count_failure(error.kind.native_type.removesuffix("_error"))
        return error_response(error, request.scope["path"])

    for routes in (tgi, completions, chat, responses, anthropic):
        app.include_router(routes.make_router(service), dependencies=[Depends(receive)])
    for routes in (openai, anthropic_count):
        app.include_router(routes.make_router(service))
    app.include_router(ops.make_router(service, lifecycle))
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
        response = refuse(request, RequestError(kinds.get(error.status_code, VALIDATION), text))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    return app


async def fault(request: Request, error: Exception) -> Response:
    """What a client is told of a fault of ours; the log has it with its traceback."""
    response = error_response(RequestError(INTERNAL, "internal error"), request.scope["path"])
    response.headers["Connection"] = "close"  # which uvicorn does
    return response


def explain(faults: Any, media_type: str) -> RequestError:
    """Pydantic's findings as one message that names fields and never repeats the input."""
    if media_type != "application/json" and not media_type.endswith("+json"):
        return RequestError(VALIDATION, NOT_JSON)
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
