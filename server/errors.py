"""What a client is told when a request fails: one table from kind to each dialect's status and type.

Texts are ours and fixed; nothing of an exception, a path or the input reaches a client. Each body names
its request by the id that the header and the log have, so that whoever reports it can be answered.
"""

from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from server.caller import CALLER


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to fail, as TGI, OpenAI and Anthropic put it; the latter two share the status."""

    native_status: int
    native_type: str
    native_prefix: str
    openai_status: int
    openai_type: str
    anthropic_type: str


INVALID = "invalid_request_error"

VALIDATION = Kind(422, "validation", "Input validation error: ", 400, INVALID, INVALID)
TEMPLATE = Kind(422, "template_error", "Template error: ", 400, INVALID, INVALID)
UNAUTHORIZED = Kind(401, "unauthorized", "", 401, INVALID, "authentication_error")
FORBIDDEN = Kind(403, "forbidden", "", 403, INVALID, "permission_error")
NOT_FOUND = Kind(404, "not_found", "", 404, INVALID, "not_found_error")
METHOD = Kind(405, "method_not_allowed", "", 405, INVALID, INVALID)
MALFORMED = Kind(400, "malformed", "", 400, INVALID, INVALID)
LATE = Kind(408, "timeout", "", 408, INVALID, INVALID)
TOO_LARGE = Kind(413, "validation", "Input validation error: ", 413, INVALID, "request_too_large")
TOO_LONG_HEAD = Kind(431, "head_too_long", "", 431, INVALID, INVALID)
OVERLOADED = Kind(429, "overloaded", "", 429, "rate_limit_error", "rate_limit_error")
GENERATION = Kind(424, "generation", "Request failed during generation: ", 500, "server_error", "api_error")
INTERNAL = Kind(500, "internal", "", 500, "server_error", "api_error")
UNAVAILABLE = Kind(503, "unavailable", "", 503, "server_error", "overloaded_error")

HEADERS = {
    UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    OVERLOADED: {"Retry-After": "1"},
    UNAVAILABLE: {"Retry-After": "1"},
}


def request_field() -> dict[str, str]:
    """The id of the present request, as a field of an error's body; none outside of requests."""
    caller = CALLER.get()
    return {} if caller is None else {"request_id": caller.request_id}


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
        body = {"error": self.kind.native_prefix + self.message, "error_type": self.kind.native_type}
        return body | request_field()

    def openai_body(self) -> dict[str, Any]:
        """OpenAI's error object; the id stands within, for their client shows that part only."""
        error = {
            "message": self.message,
            "type": self.kind.openai_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error | request_field()}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object, in which the message is all that can name the field."""
        named = self.param is None or f"`{self.param}" in self.message
        message = self.message if named else f"`{self.param}`: {self.message}"
        error = {"type": self.kind.anthropic_type, "message": message}
        return {"type": "error", "error": error} | request_field()


def is_anthropic(path: str) -> bool:
    """Whether a path speaks Anthropic's dialect."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def is_openai(path: str) -> bool:
    """Whether a path speaks OpenAI's dialect."""
    return (path == "/v1" or path.startswith("/v1/")) and not is_anthropic(path)


def error_response(error: RequestError, path: str) -> JSONResponse:
    """The error in the dialect of the path that was asked."""
    kind = error.kind
    headers = HEADERS.get(kind)
    if is_openai(path):
        return JSONResponse(error.openai_body(), kind.openai_status, headers)
    if is_anthropic(path):
        return JSONResponse(error.anthropic_body(), kind.openai_status, headers)
    return JSONResponse(error.native_body(), kind.native_status, headers)


def overloaded() -> RequestError:
    """The queue is full."""
    return RequestError(OVERLOADED, "Model is overloaded", code="overloaded")
