"""How fast this machine reads memory: what a decode step's time is held against."""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Bandwidth:
    """Reads memory with one thread a part, by whichever of some simple readers is the fastest here."""

    def __init__(self, threads: int, size: int) -> None:
        memory = torch.zeros(size // 8 // threads * threads, dtype=torch.int64)
        memory.fill_(0)  # so that every page is there, and not the one page of zeros
        self.size = memory.nbytes
        self._parts = memory.chunk(threads)
        self._pool = ThreadPoolExecutor(threads)
        self._search = ctypes.CDLL(None).memchr  # it is given no byte that it could find
        self._search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        readers: dict[str, Callable[[torch.Tensor], Any]] = {
            "torch, sum of float32": lambda part: part.view(torch.float32).sum(),
            "torch, dot of float32": lambda part: torch.dot(*[part.view(torch.float32)] * 2),
            "torch, maximum of int64": lambda part: part.max(),
            "torch, maximum of bytes": lambda part: part.view(torch.uint8).max(),
            "numpy, sum of int64": lambda part: part.numpy().sum(),
            "numpy, maximum of bytes": lambda part: part.view(torch.uint8).numpy().max(),
            "memchr": lambda part: self._search(part.data_ptr(), 1, part.nbytes),
        }
        self.trials = {name: max(self._read(reader) for _ in range(3)) for name, reader in readers.items()}
        """GB/s, the best of three."""
        self.reader = max(self.trials, key=self.trials.__getitem__)
        self._reader = readers[self.reader]

    def measure(self) -> float:
        """GB/s of one read."""
        return self._read(self._reader)

    def _read(self, reader: Callable[[torch.Tensor], Any]) -> float:
        started = time.perf_counter()
        list(self._pool.map(reader, self._parts))
        return self.size / (time.perf_counter() - started) / 1e9
