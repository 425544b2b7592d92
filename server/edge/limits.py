"""Bounds on what a client may send, kept before any of it is parsed."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import TOO_LARGE, RequestError, error_response


class BodyLimit:
    """ASGI middleware: a body above the limit is answered with 413, and no more of it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by the declared length at once, by the real one while it arrives."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLarge:
            if not started:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestError(TOO_LARGE, f"the body is larger than {self.max_bytes} bytes")
        response = error_response(error, scope["path"])
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


class _TooLarge(BaseException):
    """Passes through handlers of Exception, which would turn it into an answer of their own."""
