"""Has the system find memory for the cache's blocks before they are written, in a thread of its own.

The first write to a page waits until one is found and zeroed, and in a virtual machine until the host has
found one, too: 2 ms a MiB where that was measured (docs/kernels.md). Within a step everyone would wait.
Blocks that were never used are given out in the order of their ids, so what is written next is known.
"""

import contextlib
import threading
import weakref

from model import memory
from model.batch import Batch
from model.kv_cache import KVCache

AHEAD = 256 << 20
"""Bytes of the pool that are ready beyond what was used. Not all: an idle server leaves memory to others."""
PIECE = 64
"""Blocks at a time."""


class Prefault:
    """Keeps blocks ready that come after the last one that was used; does nothing where the system cannot."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # By group, in blocks.
        self._ahead = [-(-blocks * AHEAD // max(size, AHEAD)) for blocks in cache.num_blocks]
        self._wanted = list(self._ahead)
        self._ready = [0] * len(cache.num_blocks)
        self._done = any(layer.keys.device.type != "cpu" for layer in cache.layers)
        self._thread = self._start()

    def look(self, batch: Batch) -> None:
        """See how far a step gets that is about to run, and go on once half of what was ready is used."""
        if self._done:
            return
        behind = False
        for group, (ready, blocks) in enumerate(zip(self._ready, self._cache.num_blocks, strict=True)):
            used = 1 + max(chunk.block_tables[group][-1] for chunk in batch.chunks)  # a new one comes last
            self._wanted[group] = max(self._wanted[group], min(used + self._ahead[group], blocks))
            behind |= ready < min(used + self._ahead[group] // 2, blocks)
        if behind and not self._thread.is_alive():
            self._thread = self._start()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=_run, args=[weakref.ref(self)], name="rivulet-prefault", daemon=True)
        if not self._done:
            with contextlib.suppress(RuntimeError):  # no thread to be had: a step can wait for its pages
                thread.start()
        return thread

    def _advance(self) -> bool:
        """Make the next piece ready; False if there is none."""
        for group, (first, wanted) in enumerate(zip(self._ready, self._wanted, strict=True)):
            if first < wanted:
                end = min(first + PIECE, wanted)
                for layer in self._cache.layers:
                    if layer.group == group and not all(map(memory.populate, layer.blocks(first, end))):
                        self._done = True
                        return False
                self._ready[group] = end
                return True
        self._done = self._ready == list(self._cache.num_blocks)
        return False


def _run(of: weakref.ref[Prefault]) -> None:
    """The thread: it keeps no cache that nobody uses any more."""
    while (prefault := of()) is not None and prefault._advance():
        del prefault
