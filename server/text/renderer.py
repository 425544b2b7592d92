"""Runs chat templates in processes of their own, which the kernel holds to a time and a memory.

Knows nothing of messages. Any number of threads may render at a time; each then has its own process.
"""

import json
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping
from typing import IO, cast

from server.text import template_process
from server.text.template_process import MAX_CHARACTERS, OUT_OF_MEMORY

MAX_SECONDS = 2.0
"""Of computing, for one prompt: time that a busy machine makes us wait does not count."""
MAX_MEMORY = 512 * 1024 * 1024
_MOST_IDLE = 2
_MOST_BYTES = 12 * MAX_CHARACTERS + 100  # of an answer: JSON spells a character in twelve at most


class TemplateError(ValueError):
    """A chat template that cannot be read, or that refused or failed on these messages; one line of text."""


class Renderer:
    """Keeps processes at hand, and replaces those that a template has cost; they end with it."""

    def __init__(self, seconds: float = MAX_SECONDS, memory: int = MAX_MEMORY) -> None:
        """Start the first process; `memory` is in bytes and what each may take."""
        self._seconds, self._memory = seconds, memory
        self._idle: deque[_Process] = deque([_Process(seconds, memory)])

    def render(self, source: str, values: Mapping[str, object] | None) -> str:
        """Give what a template makes of plain values; without any, only see whether it can be read.

        Raises TemplateError.
        """
        try:
            request = json.dumps({"source": source, "values": values}).encode()
        except (ValueError, RecursionError):  # an integer of thousands of digits
            raise TemplateError("The messages are nested too deeply, or hold too large a number.") from None
        process = self._take()
        try:
            reply = process.ask(request)
        except BaseException:
            process.end()
            raise
        self._idle.append(process)
        while len(self._idle) > _MOST_IDLE:
            self._take().end()
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def _take(self) -> "_Process":
        """Take one that waits, or start one; whatever killed one in the meantime, the template did not."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return _Process(self._seconds, self._memory)
            if process.is_alive():
                return process
            process.end()


class _Process:
    """One process that runs template_process.py."""

    def __init__(self, seconds: float, memory: int) -> None:
        self._limits = {
            -signal.SIGPROF: f"takes more than {seconds:g} seconds",
            OUT_OF_MEMORY: f"needs more than {memory >> 20} MiB",
        }
        # Its file and no module: what it imports need not include us. A group of its own: Ctrl-C is for us.
        command = [sys.executable, "-P", template_process.__file__, str(seconds), str(memory)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0)
        self.end = weakref.finalize(self, _end, self._process)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> dict[str, str]:
        """Exchange a line; TemplateError if the process ends over it."""
        to, back = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        try:
            to.write(request + b"\n")
            to.flush()
            line = back.readline(_MOST_BYTES)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            status = self._process.wait()  # it has closed its end: it is gone
            why = self._limits.get(status, f"ended its process (status {status})")
            raise TemplateError(f"The chat template {why}; use shorter messages or another template.")
        return cast(dict[str, str], json.loads(line))


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()  # closes both pipes and waits
