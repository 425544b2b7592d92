"""Guesses several tokens ahead where that is worth its rows; whatever it guesses, the output is the same.

A proposer says how likely its guesses come true, and the steps show what a row costs: so many guesses
ride along as make the sequences fastest. Belongs to the engine's thread.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequences
from itertools import accumulate
from math import log, log1p
from operator import add, mul
from typing import NamedTuple, Protocol

from server.engine.request import Sequence

logger = logging.getLogger("rivulet.speculation")

MOST_GUESSES = 64
"""Guesses a step, all sequences together: each has a row of logits of its own."""
GAIN = 1.1
"""So much faster a step with guesses must promise to be: estimates err, at the cost of plain text."""
FAILURES = 3
"""After so many in a row a proposer is not asked any more."""


class Proposer(Protocol):
    """Guesses what follows sequences; whatever it raises costs guesses only."""

    @property
    def name(self) -> str:
        """As the metrics call it."""

    @property
    def computes(self) -> bool:
        """Whether it runs a model, which takes a while."""

    def chances(self, sequences: Sequences[Sequence]) -> list[list[float]]:
        """For each sequence the chances of its next guesses, each given that those before it come true.

        These are all sequences that decode now; others are forgotten.
        """

    def guess(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """Up to so many tokens for each of some of these sequences."""


class Speculator:
    """Decides for each step who gets how many guesses; without a proposer nobody does."""

    def __init__(self, proposer: Proposer | None = None) -> None:
        self.name = "" if proposer is None else proposer.name
        self._proposer = proposer
        self._prices = Prices()
        self._decoding: list[Sequence] = []  # in the last step
        self._failures = 0

    @property
    def computes(self) -> bool:
        """Whether guessing runs a model."""
        return self._proposer is not None and self._proposer.computes

    def guesses(self, decoding: Sequences[Sequence]) -> Mapping[Sequence, tuple[int, ...]]:
        """For those of the sequences that decode now where it pays."""
        if self._proposer is None:
            return {}
        if decoding != self._decoding:
            self._decoding = list(decoding)
            self._prices.renew()
        try:
            chances = self._proposer.chances(decoding)
            counts = self._plan(decoding, chances)
            guesses = self._proposer.guess(counts) if counts else {}
        except Exception:
            logger.exception("guessing by %s failed; requests go on without", self.name)
            self._failures += 1
            if self._failures == FAILURES:
                logger.error("guessing by %s failed %d times in a row and ends", self.name, FAILURES)
                self._proposer = None
            return {}
        self._failures = 0
        return guesses

    def record(self, decodes: int, guesses: int, seconds: float) -> None:
        """Learn from a step that computed nothing else; the time is that of the guessing and of the model."""
        if self._proposer is not None:
            self._prices.record(decodes, guesses, seconds)

    def _plan(
        self, sequences: Sequences[Sequence], chances: Iterable[Iterable[float]]
    ) -> dict[Sequence, int]:
        """How many guesses each gets: so many that the geometric mean of the sequences' speeds is largest.

        So nobody pays much for what others gain, while those whose texts repeat gain together.
        """
        decodes = len(sequences)
        if not self._prices.known:
            return {}
        least = decodes * self._prices.least(decodes)
        gains = []  # of each guess that could pay, in the logarithm of its sequence's speed
        for index, own in enumerate(chances):
            tokens = 1.0
            for reach in accumulate(own, mul):  # a guess counts only if all before it come true
                if (gain := log1p(reach / tokens)) < least:
                    break
                gains.append((gain, index))
                tokens += reach
        gains.sort(reverse=True)
        gained, best, count = 0.0, log(GAIN), 0
        for number, (gain, _) in enumerate(gains[:MOST_GUESSES], 1):
            gained += gain
            speed = gained / decodes - log1p(self._prices.more(decodes, number))
            if speed > best:
                best, count = speed, number
        return {sequences[index]: n for index, n in Counter(index for _, index in gains[:count]).items()}


LOOKS = 2
"""Steps without guesses that show what such a step takes, whenever other sequences decode than before."""
STEPS_BEFORE_A_LOOK = 64
"""And one after so many, for the texts grow."""
SMOOTH = 0.3
"""Weight of the newest step without guesses."""
KEEP = 0.9
"""What older steps with guesses count, at each new one."""
FORGET = 0.01
"""So much less they count with each step without: what was too dear once is tried again."""
CHEAP_ROWS = 8
"""Rows that a kernel computes at about the price of one; above, a row is first taken for its share."""
STEP_WEIGHT, ROW_WEIGHT = 1.0, 16.0
"""Of what a step's and a row's price was taken for before, against what is seen."""


class Prices:
    """What steps with guesses take more than the same steps without, as a share of those."""

    def __init__(self) -> None:
        self._alone = 0.0  # seconds of a step of these sequences without guesses
        self._looks = 0  # how many showed that
        self._age = 0  # steps since the last that did
        self._seen: dict[tuple[int, int], Seen] = {}  # by size of the decodes and of all rows
        self._lines: dict[tuple[int, int], Line] = {}  # what follows from that

    def renew(self) -> None:
        """Other sequences decode than before, with texts of other lengths."""
        self._looks = 0

    @property
    def known(self) -> bool:
        """Whether it is fresh what a step takes without guesses; else one without them is due."""
        return self._looks >= LOOKS and self._age < STEPS_BEFORE_A_LOOK

    def more(self, decodes: int, guesses: int) -> float:
        """To expect of a step with so many guesses."""
        step, row = self._line(decodes.bit_length(), (decodes + guesses).bit_length())
        return max(step + guesses * row, guesses * self.least(decodes))

    def least(self, decodes: int) -> float:
        """Of a row, which noise does not make free."""
        return _first(decodes) / 4

    def record(self, decodes: int, guesses: int, seconds: float) -> None:
        """Learn from a step."""
        self._age += 1
        self._lines.clear()
        if not guesses:
            weight = max(SMOOTH, 1 / (self._looks + 1))
            self._alone += weight * (seconds - self._alone)
            self._looks += 1
            self._age = 0
            for seen in self._seen.values():
                seen.forget(FORGET)
        elif self._looks:
            more = seconds / self._alone - 1
            # A step that was held up by something else tells nothing.
            more = min(max(more, -0.5), 4 * guesses * _first(decodes) + 1)
            sizes = decodes.bit_length(), (decodes + guesses).bit_length()
            self._seen.setdefault(sizes, Seen()).record(guesses, more)

    def _line(self, decodes: int, rows: int) -> "Line":
        """Of these sizes, alike for all of a power of two; as long as it is not known, of the size before."""
        if (decodes, rows) not in self._lines:
            before = Line(0.0, _first(1 << decodes - 1)) if rows < decodes else self._line(decodes, rows - 1)
            seen = self._seen.get((decodes, rows))
            self._lines[decodes, rows] = seen.line(before) if seen else before
        return self._lines[decodes, rows]


def _first(decodes: int) -> float:
    """What a row is taken for before any was seen."""
    return 1 / (decodes + CHEAP_ROWS)


class Line(NamedTuple):
    """What guesses cost in a step: something for the first, and each its row."""

    step: float
    row: float


class Seen:
    """What steps took more, and for how many rows."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of 1, x, x * x, y, x * y

    def record(self, x: float, y: float) -> None:
        """Take a step in; older ones count less."""
        self.forget(1 - KEEP)
        n, sx, sxx, sy, sxy = map(add, self._sums, (1, x, x * x, y, x * y))
        self._sums = n, sx, sxx, sy, sxy

    def forget(self, part: float) -> None:
        """Let what was seen count less."""
        n, sx, sxx, sy, sxy = ((1 - part) * value for value in self._sums)
        self._sums = n, sx, sxx, sy, sxy

    def line(self, before: Line) -> Line:
        """What it makes of what was believed before: ridge regression towards that (Hoerl, Kennard 1970)."""
        n, sx, sxx, sy, sxy = self._sums
        sy, sxy = sy - n * before.step - sx * before.row, sxy - sx * before.step - sxx * before.row
        n, sxx = n + STEP_WEIGHT, sxx + ROW_WEIGHT
        determinant = n * sxx - sx * sx
        step, row = (sy * sxx - sxy * sx) / determinant, (sxy * n - sy * sx) / determinant
        return Line(before.step + step, before.row + row)
