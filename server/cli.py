"""The command line: `rivulet serve`, `rivulet generate` and `rivulet bench`.

What needs torch is imported within a command: help and mistakes answer at once.
"""

import asyncio
import gc
import json
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape

from model.errors import ModelError
from server.config import BenchSettings, GenerateSettings, InvalidSettings, ServeSettings, parse_settings
from server.logs import configure
from server.phases import Phases

if TYPE_CHECKING:
    from server.startup import Loaded

USAGE = """usage: rivulet COMMAND [options]

commands:
  serve           serve a model over HTTP: TGI's /generate and OpenAI's /v1
  generate TEXT   stream one answer to the terminal
  bench           load a server with streams, ours or another, and measure it

`rivulet COMMAND --help` shows the options; each is also a RIVULET_* variable (of bench: RIVULET_BENCH_*)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status: 1 for a model that cannot be served, 2 for a wrong call."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"serve": serve, "generate": generate, "bench": bench}
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 2
    if given[0] not in commands:
        print(f"rivulet: there is no command {given[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[given[0]](given[1:])
    except ModelError as error:
        print(f"rivulet: {error}", file=sys.stderr)
        return 1
    except InvalidSettings as error:
        print(f"rivulet {given[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(arguments: Sequence[str]) -> int:
    """Load the model and serve it until a signal."""
    settings = parse_settings(ServeSettings, arguments, "rivulet serve")
    configure(settings.log_level, settings.log_format)
    signal.signal(signal.SIGTERM, _end)  # uvicorn raises it again once it has shut down
    from server.edge.serving import bind

    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or "no such address"
        print(f"rivulet: cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)
        return 1
    console = Console(stderr=True)
    phases = Phases()
    gc.disable()  # nothing that a start makes is garbage: looking for some takes a tenth of it
    with phases.measure("import torch"):
        from server.app import create_app
        from server.edge.serving import make_server
        from server.service import Limits
        from server.startup import load
    limits = Limits(settings.max_best_of, settings.max_stop_sequences, settings.max_top_n_tokens)
    loaded = load(
        settings,
        settings.served_model_name,
        settings.max_waiting,
        console,
        phases,
        limits,
        settings.served_model_aliases,
    )
    server = make_server(create_app(loaded.service, settings), settings)
    host, port = listener.getsockname()[:2]
    _welcome(console, f"http://{f'[{host}]' if ':' in host else host}:{port}", loaded, phases)
    gc.freeze()  # what is there now stays: no later collection walks through it
    gc.enable()
    server.run(sockets=[listener])
    return 0


def _end(signal_number: int, frame: object) -> NoReturn:
    """Asked to end, and ended: exit status 0."""
    sys.exit(0)


def generate(arguments: Sequence[str]) -> int:
    """Stream one answer to standard output."""
    settings = parse_settings(GenerateSettings, arguments, "rivulet generate")
    configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    console = Console(stderr=True)
    from server.startup import load
    from server.terminal import answer

    loaded = load(settings, None, 0, console, Phases())
    return asyncio.run(answer(loaded.service, settings, console))


def bench(arguments: Sequence[str]) -> int:
    """Load a server and print what it did; the last line is JSON."""
    settings = parse_settings(BenchSettings, arguments, "rivulet bench")
    from server.bench import measure

    return asyncio.run(measure(settings, Console(), Console(stderr=True)))


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
        f"  start    {phases}",
        f"  try      curl -N {address}/v1/chat/completions {headers} -d '{escape(chat)}'",
        f"           curl {address}/generate {headers} -d '{escape(body)}'\n",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
