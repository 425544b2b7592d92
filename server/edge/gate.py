"""The application that uvicorn serves: the real one once it is there, and until then a 503 that says why.

It also refuses what comes once the process is told to end, and knows what still runs.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge.lifecycle import Condition, Lifecycle, State
from server.errors import UNAVAILABLE, Kind, RequestError, error_response

HEALTH = ("/", "/health", "/ping")
READY = "/ready"
PROBES = {*HEALTH, READY, "/metrics"}
"""What supervisors ask with GET; answered to the end."""

SOON = {"Retry-After": "1"}


def health_answer(condition: Condition) -> Response:
    """Whether the process does its work, as TGI tells it."""
    if condition.healthy:
        return Response()
    return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503, SOON)


def ready_answer(condition: Condition) -> Response:
    """Whether requests are served now; if not, why."""
    if condition.state is State.READY:
        return JSONResponse({"status": "ready"})
    body = {"status": condition.state.value, "reason": condition.reason}
    if condition.progress is not None:
        body["progress"] = round(condition.progress, 3)
    return JSONResponse(body, 503, SOON)


class Gate:
    """ASGI application: passes requests on between `open` and the end of readiness."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._app: ASGIApp | None = None
        self._lifespan = AsyncExitStack()
        self._running = 0
        self.on_refusal: Callable[[Kind], None] = lambda kind: None
        """Told of what is refused here."""

    @property
    def drained(self) -> bool:
        """Whether the process was told to end, and nothing keeps it any more."""
        return self._lifecycle.drained(self._running)

    async def open(self, app: Starlette) -> None:
        """Start the application and let requests in."""
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))
        self._app = app
        self._lifecycle.ready()

    async def close(self) -> None:
        """End the application: what still runs is told an error."""
        await self._lifespan.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse in the dialect of the path."""
        asks = scope["path"] if scope["method"] in ("GET", "HEAD") else None
        condition = self._lifecycle.condition
        if self._app is not None and condition.state is State.READY:
            self._running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running -= 1
        elif self._app is not None and asks in PROBES:
            await self._app(scope, receive, send)
        elif asks == READY:
            await ready_answer(condition)(scope, receive, send)
        elif asks in HEALTH:
            await health_answer(condition)(scope, receive, send)
        else:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.on_refusal(UNAVAILABLE)
        condition = self._lifecycle.condition
        response = error_response(RequestError(UNAVAILABLE, condition.reason), scope["path"])
        if condition.state is not State.LOADING:  # else the client may come again on the same connection
            response.headers["Connection"] = "close"
        await response(scope, receive, send)
