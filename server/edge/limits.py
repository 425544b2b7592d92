"""Bounds on the body of a request, kept before any of it is parsed.

The application gets a body in one piece, once it is known to be small enough, flat enough and no form.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import TOO_LARGE, VALIDATION, Kind, RequestError, error_response

MAX_DEPTH = 64
MAX_CONTAINERS = 8192
"""Objects and lists of one body: each costs the event loop some microseconds, other values nearly nothing."""

NOT_JSON = "send the body as JSON, with the header Content-Type: application/json"
FORMS = (b"multipart/", b"application/x-www-form-urlencoded")

SQUARE = bytes.maketrans(b"{}", b"[]")
UNSTRUCTURED = bytes(set(range(256)) - set(b'[]{}"'))


class BodyLimit:
    """ASGI middleware: what is too large, too deep or a form is refused, and little of it read."""

    def __init__(self, app: ASGIApp, max_bytes: int, refused: Callable[[Kind], None]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the whole body at hand."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if not headers.keys() & {b"content-length", b"transfer-encoding"}:
            await self.app(scope, receive, send)
            return
        try:
            self._check_head(headers)
            body = await self._read(receive)
            if body is None:
                return  # the client left
            check_structure(body)
        except RequestError as error:
            self.refused(error.kind)
            response = error_response(error, scope["path"])
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        pieces = [body]

        async def whole() -> Message:
            return {"type": "http.request", "body": pieces.pop()} if pieces else await receive()

        await self.app(scope, whole, send)

    def _check_head(self, headers: dict[bytes, bytes]) -> None:
        """Refuse by what is declared (RequestError)."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        if headers.get(b"content-type", b"").strip().lower().startswith(FORMS):
            raise RequestError(VALIDATION, NOT_JSON)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body (RequestError where it becomes too large), or None if the client leaves."""
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_bytes:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(pieces)

    def _too_large(self) -> RequestError:
        return RequestError(TOO_LARGE, f"the body is larger than {self.max_bytes} bytes")


def check_structure(body: bytes) -> None:
    """Refuse JSON that is deep or full of small things (RequestError); leave what is no JSON to its parser.

    Each line goes over the body in C, for a loop here would hold the event loop for a second.
    """
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(SQUARE, UNSTRUCTURED)
    # What lies between two strings side by side tells nothing; of the rest every other part is a string.
    brackets = b"".join(text.replace(b'""', b"").split(b'"')[::2])
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise RequestError(VALIDATION, f"the body has more than {MAX_CONTAINERS} objects and lists")
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # the innermost of each place
    if b"[]" in brackets:
        raise RequestError(VALIDATION, f"the body is nested deeper than {MAX_DEPTH} levels")
