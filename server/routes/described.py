"""What /openapi.json says of answers, errors and event streams, and the page that shows it offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from server.edge.access import PUBLIC
from server.errors import is_anthropic, is_openai
from server.routes.openai_answers import OpenAIError

PAGE = Path(__file__).with_name("docs.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"

OPENAI_ERRORS = (400, 404, 413, 429, 500, 503)
NATIVE_ERRORS = (413, 422, 424, 429, 500, 503)
"""What a call that generates may end in, before its first byte."""

ERRORS = {
    400: "The body is not valid JSON, or a field of it cannot be served; `param` names it.",
    401: "There was no API key, or not a valid one.",
    404: "There is no model of that name.",
    413: "The body is too large.",
    422: "The body is not valid JSON, or a field of it cannot be served; the text names it.",
    424: "The model failed on this request.",
    429: "The queue is full; try again.",
    500: "The model failed on this request, or the server has a fault.",
    503: "The server is stopping, or its engine has ended.",
}


class NativeError(BaseModel):
    """An error of every route outside /v1; in a stream that has begun it is the last event."""

    error: str
    error_type: str = Field(description="validation, template_error, overloaded, generation, ...")
    request_id: str = Field(description="as in the header X-Request-Id and in the server's log")


def answers(
    model: Any,
    *,
    events: type[BaseModel] | None = None,
    ending: str = "",
    errors: Sequence[int] = (),
    error: type[BaseModel] = OpenAIError,
    description: str = "The answer.",
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: the answer's model, the events of its stream if it has one, and its errors.

    `ending` says what comes after the events.
    """
    good: dict[str, Any] = {"description": description}
    if model is not None:
        good["model"] = model
    if events is not None:
        good["content"] = {"text/event-stream": {"schema": event_stream(events, ending)}}
    responses: dict[int | str, dict[str, Any]] = {200: good}
    for status in errors:
        responses[status] = {"model": error, "description": ERRORS[status]}
        if status in (429, 503):
            wait = {"description": "seconds to wait", "schema": {"type": "integer"}}
            responses[status]["headers"] = {"Retry-After": wait}
    return responses


def event_stream(events: type[BaseModel], ending: str) -> dict[str, Any]:
    """The schema of a body of server-sent events; OpenAPI 3.1 has no word for the single event."""
    schema = events.model_json_schema()
    return {
        "type": "string",
        "description": f"Server-sent events: lines `data: ` with a {events.__name__} as JSON, each "
        f"followed by a blank line{ending}. Lines that begin with a colon are comments.",
        "contentMediaType": "text/event-stream",
        "contentSchema": _inlined(schema, schema.get("$defs", {})),
    }


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema that refers to nothing outside itself; none of ours is recursive."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items() if key != "$defs"}


def describe(app: FastAPI, *, keys: bool) -> None:
    """Let /openapi.json say what is so, where FastAPI takes its own habits for granted.

    `keys`: whether the server asks for them.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            for operations in document["paths"].values():
                for operation in operations.values():
                    _correct(operation["responses"])
            if keys:
                _guard(document)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _correct(responses: dict[str, Any]) -> None:
    """Drop the 422 that no route of ours gives, and JSON where the answer is none."""
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for response in responses.values():
        if response.get("content", {}).get("application/json") == {"schema": {}}:
            del response["content"]["application/json"]


def _guard(document: dict[str, Any]) -> None:
    """Either header with a key opens an operation; without one it answers 401."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    document["security"] = [{"bearer": []}, {"key": []}]
    for path, operations in document["paths"].items():
        name = "AnthropicError" if is_anthropic(path) else "OpenAIError" if is_openai(path) else "NativeError"
        schema = {"$ref": f"#/components/schemas/{name}"}
        for method, operation in operations.items():
            if path in PUBLIC and method == "get":
                operation["security"] = []
                continue
            operation["responses"]["401"] = {
                "description": ERRORS[401],
                "headers": {"WWW-Authenticate": {"schema": {"type": "string"}}},
                "content": {"application/json": {"schema": schema}},
            }


def make_router() -> APIRouter:
    """The page at /docs."""
    router = APIRouter(include_in_schema=False)
    page = PAGE.read_text()

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        """/openapi.json as tables; the page asks nothing of any other server."""
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    return router
