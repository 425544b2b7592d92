"""Guesses what follows a sequence from the sequence itself: what followed the same tokens before.

Costs a token two entries in a table and a step next to nothing, whatever the sequence's length.
Source: prompt lookup decoding (Saxena 2023), here with an index that grows with the text.
"""

from collections.abc import Sequence as Sequences

from server.engine.request import Sequence

LONG, SHORT = 4, 2
"""Tokens that are looked for: so many, and else so few."""
BITS = 32
"""Of a token's id in a key."""
LONG_MASK, SHORT_MASK = (1 << BITS * LONG) - 1, (1 << BITS * SHORT) - 1

MOST = 16
"""Matches of so many tokens and more are taken for alike."""
OWN, COMMON = 0.15, 0.02
"""Weights of the newest guess in a sequence's own experience, and in that with which others begin."""


class PromptLookup:
    """For sequences that decode: each has a text of its own, and all begin with a common experience."""

    name = "prompt-lookup"
    computes = False

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: dict[Sequence, Text] = {}
        self._chances = [length / (length + LONG) for length in range(MOST + 1)]

    def chances(self, sequences: Sequences[Sequence]) -> list[list[float]]:
        """For each the chances of its next guesses; sequences that are not among these are forgotten."""
        texts = self._texts
        self._texts = {one: texts.get(one) or Text(self._chances) for one in sequences}
        return [
            text.chances(one.token_ids, min(self._most, one.most_guesses))
            for one, text in self._texts.items()
        ]

    def guess(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """So many tokens for each of the sequences that chances were given for."""
        return {one: self._texts[one].guess(one.token_ids, count) for one, count in counts.items()}


class Text:
    """One sequence's index of what followed where, and the place that its end repeats."""

    def __init__(self, common: list[float]) -> None:
        self._common = common
        self._experience = common.copy()  # by tokens that match: how often what followed there came again
        self._long: dict[int, int] = {}  # the place after each run of tokens, where it was last
        self._short: dict[int, int] = {}
        self._indexed = 0
        self._key = 0  # the last LONG tokens
        self._source = 0  # the place of the next guess; 0 is none
        self._length = 0  # tokens before it that match the end

    def chances(self, token_ids: Sequences[int], most: int) -> list[float]:
        """Of the next guesses, each given that those before it come true."""
        self._extend(token_ids)
        if not self._source or not most:
            return []
        lengths = range(self._length, self._length + most)
        return [self._experience[min(length, MOST)] for length in lengths]

    def guess(self, token_ids: Sequences[int], count: int) -> tuple[int, ...]:
        """What followed before; where that is the end itself, it goes round."""
        guesses = list(token_ids[self._source : self._source + count])
        while len(guesses) < count:
            guesses += guesses[: count - len(guesses)]
        return tuple(guesses)

    def _extend(self, token_ids: Sequences[int]) -> None:
        """Take new tokens in: each one tells whether its guess was right, asked for or not."""
        key, long, short = self._key, self._long, self._short
        for place in range(self._indexed, len(token_ids)):
            token = token_ids[place]
            if self._source:
                self._follow(token_ids[self._source] == token)
            if place >= LONG:
                long[key] = place
            if place >= SHORT:
                short[key & SHORT_MASK] = place
            key = (key << BITS | token) & LONG_MASK
        self._key, self._indexed = key, len(token_ids)
        if self._length < LONG:
            self._find()

    def _follow(self, right: bool) -> None:
        """Learn from a guess, and go on behind it or lose the place."""
        length = min(self._length, MOST)
        for experience, weight in ((self._experience, OWN), (self._common, COMMON)):
            experience[length] += weight * (right - experience[length])
        self._source = self._source + 1 if right else 0
        self._length = self._length + 1 if right else 0

    def _find(self) -> None:
        """The last place that had the same tokens before it; a longer match than the present one wins."""
        if source := self._long.get(self._key, 0):
            self._source, self._length = source, LONG
        elif not self._source and (source := self._short.get(self._key & SHORT_MASK, 0)):
            self._source, self._length = source, SHORT
