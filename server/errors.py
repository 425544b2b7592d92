"""What a client is told when a request fails: one table from kind to each dialect's status and type.

Texts are ours and fixed; nothing of an exception, a path or the input reaches a client. Each body names
its request by the id that the header and the log have, so that whoever reports it can be answered.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from starlette.responses import JSONResponse

from server.caller import CALLER

Rejection = Literal[
    "overloaded",  # no place, or too many prompt tokens wait
    "unavailable",  # the model is not there (yet, or any more)
    "unauthorized",  # no key, or a wrong one
    "host",  # a name that a server without keys does not answer to
    "invalid",  # a path, method, head or body that cannot be
    "too_large",  # a body or a head
    "timeout",  # a head or a body that did not come in time
    "connections",  # one connection more than are taken
]
"""Why a request is refused."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to fail, as TGI, OpenAI and Anthropic put it; the latter two share the status."""

    native_status: int
    native_type: str
    native_prefix: str
    openai_status: int
    openai_type: str
    anthropic_type: str
    rejection: Rejection | None = None
    """By what it is counted; None for what fails later than at the door."""


INVALID = "invalid_request_error"
INPUT = "Input validation error: "

VALIDATION = Kind(422, "validation", INPUT, 400, INVALID, INVALID, "invalid")
TEMPLATE = Kind(422, "template_error", "Template error: ", 400, INVALID, INVALID, "invalid")
UNAUTHORIZED = Kind(401, "unauthorized", "", 401, INVALID, "authentication_error", "unauthorized")
FORBIDDEN = Kind(403, "forbidden", "", 403, INVALID, "permission_error", "host")
NOT_FOUND = Kind(404, "not_found", "", 404, INVALID, "not_found_error", "invalid")
METHOD = Kind(405, "method_not_allowed", "", 405, INVALID, INVALID, "invalid")
MALFORMED = Kind(400, "malformed", "", 400, INVALID, INVALID, "invalid")
LATE = Kind(408, "timeout", "", 408, INVALID, INVALID, "timeout")
TOO_LARGE = Kind(413, "validation", INPUT, 413, INVALID, "request_too_large", "too_large")
TOO_LONG_HEAD = Kind(431, "head_too_long", "", 431, INVALID, INVALID, "too_large")
OVERLOADED = Kind(429, "overloaded", "", 429, "rate_limit_error", "rate_limit_error", "overloaded")
GENERATION = Kind(424, "generation", "Request failed during generation: ", 500, "server_error", "api_error")
INTERNAL = Kind(500, "internal", "", 500, "server_error", "api_error")
UNAVAILABLE = Kind(503, "unavailable", "", 503, "server_error", "overloaded_error", "unavailable")
CROWDED = replace(UNAVAILABLE, rejection="connections")

HEADERS = {
    UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    OVERLOADED: {"Retry-After": "1"},
    UNAVAILABLE: {"Retry-After": "1"},
    CROWDED: {"Retry-After": "1"},
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
