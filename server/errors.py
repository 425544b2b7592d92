"""What a client is told when a request fails: one table from kind to each dialect's status and type.

Texts are ours and fixed; nothing of an exception, a path or the input reaches a client.
"""

from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to fail, as TGI and OpenAI put it."""

    native_status: int
    native_type: str
    native_prefix: str
    openai_status: int
    openai_type: str


VALIDATION = Kind(422, "validation", "Input validation error: ", 400, "invalid_request_error")
TEMPLATE = Kind(422, "template_error", "Template error: ", 400, "invalid_request_error")
NOT_FOUND = Kind(404, "not_found", "", 404, "invalid_request_error")
METHOD = Kind(405, "method_not_allowed", "", 405, "invalid_request_error")
TOO_LARGE = Kind(413, "validation", "Input validation error: ", 413, "invalid_request_error")
OVERLOADED = Kind(429, "overloaded", "", 429, "rate_limit_error")
GENERATION = Kind(424, "generation", "Request failed during generation: ", 500, "server_error")
INTERNAL = Kind(500, "internal", "", 500, "server_error")
UNAVAILABLE = Kind(503, "unavailable", "", 503, "server_error")


class RequestError(Exception):
    """A request that ends in an error of a `kind`; `param` and `code` are told on /v1 only."""

    def __init__(
        self, kind: Kind, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code

    def native_body(self) -> dict[str, Any]:
        """TGI's error object."""
        return {"error": self.kind.native_prefix + self.message, "error_type": self.kind.native_type}

    def openai_body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {
            "message": self.message,
            "type": self.kind.openai_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def is_openai(path: str) -> bool:
    """Whether a path speaks OpenAI's dialect."""
    return path == "/v1" or path.startswith("/v1/")


def error_response(error: RequestError, path: str) -> JSONResponse:
    """The error in the dialect of the path that was asked."""
    kind = error.kind
    headers = {"Retry-After": "1"} if kind in (OVERLOADED, UNAVAILABLE) else None
    if is_openai(path):
        return JSONResponse(error.openai_body(), kind.openai_status, headers)
    return JSONResponse(error.native_body(), kind.native_status, headers)


def overloaded() -> RequestError:
    """The queue is full."""
    return RequestError(OVERLOADED, "Model is overloaded", code="overloaded")
