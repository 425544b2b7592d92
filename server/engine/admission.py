"""How much may be in the engine at once: places (running and waiting) and waiting prompt tokens.

The last of both is kept for clients that have nothing here, so that none can shut the others out.
"""

from collections import Counter
from collections.abc import Sequence

from server.engine.request import Request

KEPT = 8
"""One in so many waiting places and tokens is kept for newcomers."""


class Overloaded(Exception):
    """There is no room; the requests were not admitted."""


class Admission:
    """The books of what was admitted; belongs to the event loop."""

    def __init__(self, max_running: int, max_waiting: int, max_waiting_tokens: int) -> None:
        self.places = max_running + max_waiting
        self._max_waiting = max_waiting
        self._max_tokens = max_waiting_tokens
        self._clients: Counter[str] = Counter()  # places by client
        self._waiting: dict[str, int] = {}  # request id -> prompt tokens, until it is computed

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that no step has computed yet."""
        return sum(self._waiting.values())

    def check(self, client: str, places: int = 1, tokens: int = 1) -> None:
        """Whether a client may take so many places and prompt tokens more (Overloaded)."""
        newcomer = not self._clients[client]
        limit = self.places - (0 if newcomer else self._max_waiting // KEPT)
        taken = self._clients.total()
        if taken + places > limit:
            raise Overloaded(f"{taken} of {limit} places are taken")
        limit = self._max_tokens - (0 if newcomer else self._max_tokens // KEPT)
        # One prompt always finds room where nothing waits, whatever its length.
        waiting = self.waiting_tokens
        if waiting and waiting + tokens > limit:
            raise Overloaded(f"{waiting} of {limit} prompt tokens wait already")

    def admit(self, requests: Sequence[Request]) -> None:
        """Enter requests of one client together, or not at all (Overloaded)."""
        tokens = {request.id: _prompt_cost(request) for request in requests}
        client = requests[0].client
        self.check(client, len(requests), sum(tokens.values()))
        self._clients[client] += len(requests)
        self._waiting |= tokens

    def start(self, request_id: str) -> None:
        """A request's prompt is being computed: it waits no longer; once more is no error."""
        self._waiting.pop(request_id, None)

    def leave(self, request: Request) -> None:
        """A request ended, one way or the other."""
        self.start(request.id)
        self._clients[request.client] -= 1
        if not self._clients[request.client]:
            del self._clients[request.client]


def _prompt_cost(request: Request) -> int:
    """Prompt tokens to compute; a fork shares those of another request but for the last."""
    return 1 if request.fork_of is not None else len(request.prompt_ids)
