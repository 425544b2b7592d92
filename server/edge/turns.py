"""Spreads what many connections say at once over turns of the event loop; turnstile.py does what follows."""

import asyncio
from collections import deque
from collections.abc import Callable

PER_TURN = 4
"""Pieces that are read in one turn of the loop; with the request's beginning each costs it 0.2 ms, or 0.6."""


class Turns:
    """One an event loop; calls wait in the order in which they came, and one that is alone never waits."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._taken = 0
        """Those of this turn."""

    def take(self) -> bool:
        """Whether there is room in this turn; who gets none calls `wait`."""
        if not self._taken:
            asyncio.get_running_loop().call_soon(self._turn)
        if self._waiting or self._taken >= PER_TURN:
            return False
        self._taken += 1
        return True

    def wait(self, call: Callable[[], None]) -> None:
        """Call it in a later turn."""
        self._waiting.append(call)

    def _turn(self) -> None:
        """The next turn: so many more are called."""
        self._taken = min(PER_TURN, len(self._waiting))
        if self._taken:
            asyncio.get_running_loop().call_soon(self._turn)
        for _ in range(self._taken):
            self._waiting.popleft()()
