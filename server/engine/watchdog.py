"""Notices a step that never ends: a thread that looks at the engine's pulse from time to time.

It costs a step one number written, no lock and no clock.
"""

import threading
from collections.abc import Callable

LOOKS = 8
"""Looks in the time that a step may take. Counted, not timed: while the whole process is suspended,
nobody looks either."""


class Watchdog:
    """Calls `on_stuck`, once, when one beat of the pulse has lasted for more than `seconds`.

    `pulse` gives another number at each step, and None while there is nothing to do.
    """

    def __init__(self, seconds: float, pulse: Callable[[], int | None], on_stuck: Callable[[], None]) -> None:
        self._seconds = seconds
        self._pulse = pulse
        self._on_stuck = on_stuck
        self._ended = threading.Event()

    def start(self) -> None:
        """Look until `stop`."""
        threading.Thread(target=self._watch, name="rivulet-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()

    def _watch(self) -> None:
        beat, seen = None, 0
        while not self._ended.wait(self._seconds / LOOKS):
            now = self._pulse()
            seen = seen + 1 if now == beat and now is not None else 0
            beat = now
            if seen == LOOKS:
                self._on_stuck()
                return
