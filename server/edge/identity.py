"""Names each request and its sender before anything else looks at it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.caller import CALLER, Caller


class CallerMiddleware:
    """ASGI middleware, the outermost: makes the Caller of a request and tells its id in a header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with scope["state"]["caller"] set."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = Caller(scope["client"][0] if scope.get("client") else "local")
        scope.setdefault("state", {})["caller"] = caller
        CALLER.set(caller)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", caller.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, named)
