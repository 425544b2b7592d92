"""Executes a step so that only those fail who make it fail: what raises is tried again in parts.

Trying again is safe: the same rows write the same keys and values into the same blocks, a draw depends
on the seed and the token's place, and a constraint advances only when the step is taken in.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from model.batch import Batch, Chunk, StepResult
from model.errors import OutOfMemory

logger = logging.getLogger("rivulet.engine")


@dataclass(slots=True)
class Outcome:
    """What came of a step."""

    computed: list[tuple[Batch, StepResult]] = field(default_factory=list)
    """Its parts that went well; the whole batch if nothing raised."""
    failed: list[str] = field(default_factory=list)
    """Requests that raise when they are alone."""
    shed: list[str] = field(default_factory=list)
    """Requests given up so that the memory is enough for the others."""
    smooth: bool = True
    """Whether nothing raised."""


def attempt(batch: Batch, execute: Callable[[Batch], StepResult], newest: Callable[[Batch], str]) -> Outcome:
    """Execute a batch; `newest` tells who goes first when memory is short.

    Each part is tried once, so that a batch of n sequences takes less than 2 n executions at worst.
    """
    outcome = Outcome()
    parts = [batch]
    while parts:
        part = parts.pop()
        chunks = part.chunks
        # What is tried next is only noted here: a pending exception would keep the failed step's tensors.
        try:
            outcome.computed.append((part, execute(part)))
        except OutOfMemory as error:
            outcome.smooth = False
            victim = newest(part)
            logger.warning("no memory for %d requests, %s is given up: %s", len(chunks), victim, error)
            outcome.shed.append(victim)
            if rest := tuple(chunk for chunk in chunks if chunk.request_id != victim):
                parts.append(_part(batch, rest))
        except Exception as error:
            outcome.smooth = False
            if len(chunks) == 1:
                logger.exception("the model failed on request %s", chunks[0].request_id)
                outcome.failed.append(chunks[0].request_id)
            else:
                logger.warning("a step of %d requests failed, each half is tried: %r", len(chunks), error)
                middle = len(chunks) // 2
                parts += [_part(batch, chunks[middle:]), _part(batch, chunks[:middle])]
    return outcome


def _part(batch: Batch, chunks: tuple[Chunk, ...]) -> Batch:
    """Some of a batch's chunks, and the copies into blocks of theirs."""
    blocks = [set(chain(*tables)) for tables in zip(*(chunk.block_tables for chunk in chunks), strict=True)]
    return Batch(chunks, tuple(copy for copy in batch.copies if copy.target in blocks[copy.group]))
