"""The queue of sequences that wait for blocks: first come, first served, and clients take turns.

Fair queueing in virtual time, which goes on as a client is served that has its share: a client's next
sequence starts where its last one ends, so whoever floods the queue waits behind itself, not before others.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from server.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence stands."""

    sequence: Sequence
    start: float
    """In virtual time: tokens served to each client that waits."""
    cost: int
    """Tokens; 0 for one that has been served before."""


class WaitingQueue:
    """Sequences in the order in which they are to run."""

    def __init__(self) -> None:
        self._places: list[Place] = []  # ascending by start
        self._now = 0.0
        self._ends: dict[str, float] = {}  # by client: where its last sequence ends

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Sequence]:
        return (place.sequence for place in self._places)

    @property
    def first(self) -> Sequence:
        """Who is next."""
        return self._places[0].sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a newcomer behind its client's others, and fairly among the clients."""
        place = self.charge(sequence)
        index = len(self._places)
        while index and self._places[index - 1].start > place.start:
            index -= 1
        self._places.insert(index, place)

    def charge(self, sequence: Sequence) -> Place:
        """Let its client's next sequence start after this one; gives where this one belongs.

        It counts as what it may come to, in tokens: what it will really take is not known yet.
        """
        request = sequence.request
        cost = len(request.prompt_ids) + request.max_tokens
        start = max(self._now, self._ends.get(request.client, 0.0))
        self._ends[request.client] = start + cost
        return Place(sequence, start, cost)

    def insert(self, index: int, sequence: Sequence) -> None:
        """Queue one at a given place that was charged before: a fork, or one that lost its blocks."""
        neighbours = self._places[index : index + 1] or self._places[-1:]
        start = neighbours[0].start if neighbours else self._now
        self._places.insert(index, Place(sequence, start, 0))

    def pop(self) -> Sequence:
        """Take out who is next."""
        clients = {sequence.request.client for sequence in self}
        place = self._places.pop(0)
        self._now = max(self._now, place.start) + place.cost / len(clients)
        if len(self._ends) > 2 * len(clients) + 64:  # clients that are gone
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}
        return place.sequence

    def remove(self, sequence: Sequence) -> int:
        """Take one out that is given up; gives the index that it had."""
        index = list(self).index(sequence)
        del self._places[index]
        return index
