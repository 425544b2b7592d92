"""The life of a serving process: answer, load, serve, drain, end; every way out has its exit status.

The main thread loads the model and heeds the signals; HTTP and the engine have threads of their own.
"""

import faulthandler
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from model.lean import give_back, import_torch
from server.config import ServeSettings
from server.edge.gate import Gate
from server.edge.lifecycle import Lifecycle, State
from server.edge.serving import bind, make_server
from server.engine.engine import Fault
from server.exits import ExitStatus
from server.phases import Phases

if TYPE_CHECKING:
    from server.startup import Loaded

logger = logging.getLogger("rivulet.process")

FAULT_SECONDS = 1.5
"""From a fault to the end: clients get their error events, and a probe can see it."""
END_SECONDS = 2.0
"""From the end of the drain, or of the loading, to that of the process, whatever hangs."""

GIL_SECONDS = 0.0005
"""After which a thread that computes lets the event loop go on; Python's own 5 ms, at each of the loop's
system calls, add up in a crowd."""

FULL_COLLECTION = 100
"""Collections of what is young before one of all, which then comes after 700,000 objects that stayed (700 a
collection in Python 3.11). With its own 10, five hundred connections at once took two, of 50 ms in which
nobody got a token."""

SIGNALS = {signal.SIGTERM: ExitStatus.ENDED, signal.SIGINT: ExitStatus.INTERRUPTED}
FAULTS = {Fault.STUCK: ExitStatus.STUCK, Fault.FAILED: ExitStatus.FAULT}


class Ending:
    """When and with what status the process ends: by a signal, or by a fault of the engine."""

    def __init__(self, lifecycle: Lifecycle, drain_seconds: float) -> None:
        self.status: int | None = None
        """Once it is known."""
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._deadlines: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()

    def heed(self) -> None:
        """Heed the signals, and hold the deadlines."""
        threading.Thread(target=self._enforce, name="rivulet-ending", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        """End once what runs has ended; at once if it still loads, or at a second signal."""
        if self.status is not None:
            os._exit(128 + number)
        self.status = SIGNALS[signal.Signals(number)]
        if self._lifecycle.state is State.LOADING:
            self._deadlines.put((END_SECONDS, self.status))
            raise SystemExit(self.status)  # through the loading, which takes its downloads along
        self._lifecycle.drain(self._drain_seconds)
        self._deadlines.put((self._drain_seconds + END_SECONDS, self.status))

    def on_fault(self, fault: Fault, reason: str) -> None:
        """Show it for a moment, then end; the supervisor starts the process again."""
        self._lifecycle.fail(fault, reason)
        if self.status is None:  # else it ends anyway, and sooner: nothing runs any more
            self.status = FAULTS[fault]
            logger.critical("%s: the process ends with status %d", reason, self.status)
            self._deadlines.put((FAULT_SECONDS, self.status))

    def _enforce(self) -> None:
        """End the process when its first deadline is over, even if a native call never returns."""
        seconds, status = self._deadlines.get()  # its `put` may be called from a signal's handler
        time.sleep(seconds)
        os._exit(status)


def serve(settings: ServeSettings, console: Console) -> int:
    """Load the model and serve it until a signal or a fault; gives the exit status (ModelError)."""
    faulthandler.enable(2)  # a native fault shows where it was, and still ends the process by its signal
    phases = Phases()
    lifecycle = Lifecycle(phases)
    ending = Ending(lifecycle, settings.shutdown_timeout)
    ending.heed()
    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or "no such address"
        print(f"rivulet: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)
        return ExitStatus.CANNOT_SERVE
    host, port = listener.getsockname()[:2]
    server = make_server(Gate(lifecycle), settings)
    server.start(listener)
    try:
        gc.disable()  # nothing that a start makes is garbage: looking for some takes a tenth of it
        with phases.measure("import torch"):
            import_torch()
            from server.app import create_app, warm_up
            from server.service import Limits
            from server.startup import load
        names = (settings.served_model_name, settings.served_model_aliases, settings.lora)
        loaded = load(settings, console, phases, Limits.of(settings), *names, on_fault=ending.on_fault)
        app = create_app(loaded.service, settings, lifecycle)
        warm_up(app)
        server.open(app)
        scheme = "http" if settings.tls_certificate is None else "https"
        _welcome(console, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", loaded, phases)
        give_back()
        sys.setswitchinterval(GIL_SECONDS)
        gc.freeze()  # what is there now stays: no later collection walks through it
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
        gc.enable()
        server.join()
    finally:
        server.stop()
    return ExitStatus.FAULT if ending.status is None else ending.status


def _welcome(console: Console, address: str, loaded: "Loaded", phases: Phases) -> None:
    """The first screen: where, what, how large, how long it took, and what to try."""
    model = loaded.service.model
    body = json.dumps({"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20}})
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    chat = json.dumps({"messages": question, "temperature": 0, "stream": True})
    headers = "-H 'Content-Type: application/json'"
    lines = (
        f"\n[bold]{model.name}[/bold] on [bold]{address}[/bold]",
        f"  runs on  {loaded.device}",
        *([] if loaded.note is None else [f"           {loaded.note}"]),
        f"  memory   {loaded.cache}",
        *([] if loaded.adapters is None else [f"  adapters {escape(loaded.adapters)}"]),
        f"  start    {phases}",
        f"  try      curl -N {address}/v1/chat/completions {headers} -d '{escape(chat)}'",
        f"           curl {address}/generate {headers} -d '{escape(body)}'\n",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
