"""Names each request and its sender before anything else looks at it, and logs it once it is over."""

import logging
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.caller import CALLER, PIECES, Caller, Tally
from server.edge.access import is_public
from server.errors import is_anthropic

logger = logging.getLogger("rivulet.access")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""What a client may call its request; anything else is replaced, for it goes into headers and logs."""
MOST_PATH = 200
"""Characters of a path that are logged."""


class CallerMiddleware:
    """ASGI middleware, the outermost: makes the Caller of a request and tells its id in a header."""

    def __init__(self, app: ASGIApp, log_prompts: bool = False) -> None:
        self.app = app
        self.log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with scope["state"]["caller"] set."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = _caller(scope, Tally(self.log_prompts))
        scope.setdefault("state", {})["caller"] = caller
        scope.setdefault("extensions", {})[PIECES] = {"send": send}
        CALLER.set(caller)
        told = caller.request_id.encode()
        names = (b"x-request-id", b"request-id") if is_anthropic(scope["path"]) else (b"x-request-id",)
        status: int | None = None

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *((name, told) for name in names)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            # A supervisor asks every few seconds: that it was told "well", or "not yet", is no news, and a
            # fault has lines of its own.
            quiet = is_public(scope) and status in (200, 503)
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={"fields": _fields(scope, status)},
            )


def _caller(scope: Scope, tally: Tally) -> Caller:
    """The sender as far as it is known without a key."""
    client = scope["client"][0] if scope.get("client") else "local"
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    if REQUEST_ID.fullmatch(given):
        return Caller(client, given.decode("ascii"), tally=tally)
    return Caller(client, tally=tally)


def _fields(scope: Scope, status: int | None) -> dict[str, Any]:
    """What the log tells of a request: never its query, which may hold secrets, and no text unless asked."""
    caller: Caller = scope["state"]["caller"]  # by now with the name of its key
    tally = caller.tally
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": scope.get("raw_path", scope["path"].encode()).decode("ascii", "replace")[:MOST_PATH],
        "status": status,
        "seconds": round(time.perf_counter() - caller.received, 4),
        "client": caller.client,
    }
    if tally.prompt_tokens is not None:
        fields |= {"prompt_tokens": tally.prompt_tokens, "output_tokens": tally.output_tokens}
        if tally.keeps_texts:
            fields |= {"inputs": tally.inputs, "outputs": tally.outputs}
    return fields
