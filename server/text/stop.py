"""Stop strings in a streamed text: found wherever they begin and end, in time linear in the text.

Knows nothing about tokens. What may be sent is decided here, and only what could begin a stop string waits.
"""

from collections.abc import Sequence


class StopMatcher:
    """Cuts one text off at the first stop string.

    The match that ends first wins, and of those that end together the longest. With `keep` the text ends
    after the stop string and nothing ever waits (TGI); without, it ends before the stop string, and the
    longest suffix that could begin one is held back (OpenAI).
    """

    matched: str | None
    """The stop string that was found; after it nothing more is given."""

    def __init__(self, stops: Sequence[str], keep: bool) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self.matched = None
        self._automata = [_Automaton(stop) for stop in stops]
        self._keep = keep
        self._held = ""

    def push(self, delta: str) -> str:
        """Take the next piece of text and give what may be sent now."""
        if not self._automata:
            return delta
        if self.matched is not None:
            return ""
        text = self._held + delta
        found: list[tuple[int, int, str]] = []
        for automaton in self._automata:
            end = automaton.feed(delta)
            if end is not None:
                found.append((end, -len(automaton.stop), automaton.stop))
        if found:
            end, _, self.matched = min(found)
            cut = len(self._held) + end
            self._held = ""
            return text[: cut if self._keep else cut - len(self.matched)]
        if self._keep:
            return text
        waiting = max((automaton.state for automaton in self._automata), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def flush(self) -> str:
        """End the text: give what was held back, which is no stop string after all."""
        rest, self._held = self._held, ""
        return rest


class _Automaton:
    """Knuth, Morris and Pratt's: `state` is how much of the stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        # failure[n]: the longest proper prefix of stop[:n] that is also its suffix.
        self._failure = [0, 0]
        for char in stop[1:]:
            state = self._failure[-1]
            while state and char != stop[state]:
                state = self._failure[state]
            self._failure.append(state + (char == stop[state]))

    def feed(self, text: str) -> int | None:
        """Read on; give the index after the first match's last character, or None if there is no match."""
        stop, failure, state = self.stop, self._failure, self.state
        position = 0
        while position < len(text):
            if state == 0:
                # Most text begins nothing: `find` passes over it at the speed of C.
                position = text.find(stop[0], position)
                if position < 0:
                    break
            char = text[position]
            while state and char != stop[state]:
                state = failure[state]
            if char == stop[state]:
                state += 1
            position += 1
            if state == len(stop):
                return position
        self.state = state
        return None
