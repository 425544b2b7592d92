"""How many rows of prompts may ride along with decodes, so that running streams keep their pace.

A step is predicted to take what its decodes take alone, plus so much a row of prompt; both are learnt
from the steps themselves. Nothing is known here of a device or a model.
"""

SLOWDOWN = 2.6
"""A step with prompts in it may take this many times what its decodes take alone, while there are no more
newcomers than decodes. Where there are more, prompts get more of the time in proportion: few streams that
keep their pace would keep the many from becoming streams, and the batch small."""
LEAST_ROWS = 8
"""Newcomers always get on: as many rows as a kernel computes at about the price of one."""
STEPS_BEFORE_A_LOOK = 50
"""So many steps with prompts in them, and one goes without: what decodes take alone is seen anew."""
GAIN = 0.25
"""Weight of the newest step."""


class Pacer:
    """Learns from the steps; belongs to the engine's thread."""

    def __init__(self) -> None:
        self._alone: dict[int, float] = {}  # by size of the decodes: seconds that they take alone
        self._mixed: dict[int, int] = {}  # steps of that size since they were last seen alone
        self._row: float | None = None  # seconds a row of prompt

    def prefill_rows(self, decodes: int, newcomers: int) -> int | None:
        """Rows of prompts for so many newcomers beside so many decodes, at most (None: no bound)."""
        if not decodes:
            return None
        size = _size(decodes)
        if size not in self._alone or self._mixed[size] >= STEPS_BEFORE_A_LOOK:
            return 0
        if self._row is None:
            return LEAST_ROWS
        seconds = (SLOWDOWN - 1) * self._alone[size] * max(1, newcomers / decodes)
        return max(LEAST_ROWS, int(seconds / self._row))

    def record(self, decodes: int, prefill_rows: int, seconds: float) -> None:
        """Learn from a step."""
        size = _size(decodes)
        if not prefill_rows:
            self._alone[size] = _smooth(self._alone.get(size), seconds)
            self._mixed[size] = 0
        elif not decodes or size in self._alone:
            rest = seconds - self._alone[size] if decodes else seconds
            # The decodes' share is an estimate: it leaves something for the rows in any case.
            self._row = _smooth(self._row, max(rest, seconds / 10) / prefill_rows)
            if decodes:
                self._mixed[size] += 1


def _size(decodes: int) -> int:
    """Numbers of decodes that are taken for alike: those of the same power of two."""
    return decodes.bit_length()


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + GAIN * (now - before)
