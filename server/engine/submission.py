"""What came of requests that were admitted together: their outputs as an asynchronous stream."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from server.engine.request import Request, TokenOutput


class Submission:
    """Requests that were admitted together: iterate over their outputs, and close it in any case.

    Closing is idempotent and frees the requests' blocks within a step, wherever they stand.
    """

    def __init__(self, requests: Sequence[Request], abort: Callable[[str], None]) -> None:
        self.requests = tuple(requests)
        self.submitted = time.perf_counter()
        self.started: float | None = None
        """When the first of the requests was first computed."""
        self._abort = abort
        self._open = set(range(len(requests)))
        # Bounded by what the requests may generate, so it needs no bound of its own. An asyncio.Queue does
        # the same for any number of readers, at several times the cost of each token.
        self._outputs: deque[tuple[int, TokenOutput]] = deque()
        self._arrival: asyncio.Future[None] | None = None  # the reader's, while it waits

    def put(self, index: int, output: TokenOutput) -> None:
        """Take an output for the request at `index` from the engine (on the event loop)."""
        self._outputs.append((index, output))
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """(Index of the request, output) in order; each request's last carries its finish reason."""
        while self._open:
            while not self._outputs:
                self._arrival = asyncio.get_running_loop().create_future()
                await self._arrival
            index, output = self._outputs.popleft()
            if index not in self._open:
                continue  # computed before the engine learnt that the request was cancelled
            if output.finish_reason is not None:
                self._open.discard(index)
            yield index, output

    def cancel(self, index: int) -> None:
        """Give one request up, if it is still running; no output of it follows."""
        if index in self._open:
            self._open.discard(index)
            self._abort(self.requests[index].id)

    def close(self) -> None:
        """Give up whatever is still running."""
        for index in list(self._open):
            self.cancel(index)
