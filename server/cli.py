"""The command line: `rivulet serve` and `rivulet generate`."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from server.config import (
    GenerateSettings,
    InvalidSettings,
    ModelSettings,
    ServeSettings,
    parse_settings,
)
from server.logs import configure

if TYPE_CHECKING:
    from server.startup import Loaded, Phases

USAGE = """usage: rivulet COMMAND [options]

commands:
  serve           serve a model over HTTP: TGI's /generate and OpenAI's /v1
  generate TEXT   stream one answer to the terminal

`rivulet COMMAND --help` shows the options; each is also a RIVULET_* variable."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status: 1 for a model that cannot be served, 2 for a wrong call."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"serve": serve, "generate": generate}
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 2
    if given[0] not in commands:
        print(f"rivulet: there is no command {given[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[given[0]](given[1:])
    except InvalidSettings as error:
        print(f"rivulet {given[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(arguments: Sequence[str]) -> int:
    """Load the model and serve it until a signal."""
    settings = parse_settings(ServeSettings, arguments, "rivulet serve")
    configure(settings.log_level, settings.log_format)
    console = Console(stderr=True)
    loaded, phases = _load(settings, settings.served_model_name, settings.max_waiting, console)
    if loaded is None:
        return 1
    import uvicorn

    from server.app import create_app

    config = uvicorn.Config(
        create_app(loaded.service),
        host=settings.host,
        port=settings.port,
        http="h11",  # bounds the size of headers, which httptools does not
        ws="none",
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=30,
    )
    try:
        listener = config.bind_socket()
    except SystemExit:  # uvicorn's way to say that the address is taken
        print(
            f"rivulet: cannot listen on {settings.host}:{settings.port}; another --port may be free",
            file=sys.stderr,
        )
        return 1
    host, port = listener.getsockname()[:2]
    _welcome(console, f"http://{f'[{host}]' if ':' in host else host}:{port}", loaded, phases)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Stream one answer to standard output."""
    settings = parse_settings(GenerateSettings, arguments, "rivulet generate")
    configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    console = Console(stderr=True)
    loaded, _ = _load(settings, None, 0, console)
    if loaded is None:
        return 1
    from server.once import generate_once

    return asyncio.run(generate_once(loaded.service, settings, console))


def _load(
    settings: ModelSettings, name: str | None, max_waiting: int, console: Console
) -> "tuple[Loaded | None, Phases | None]":
    """Load the model, or say in one sentence why not."""
    started = time.perf_counter()
    from model.errors import ModelError
    from server import startup

    phases = startup.Phases()
    phases.seconds["import torch"] = time.perf_counter() - started
    try:
        return startup.load(settings, name, max_waiting, console, phases), phases
    except ModelError as error:
        print(f"rivulet: {error}", file=sys.stderr)
        return None, None


def _welcome(console: Console, address: str, loaded: "Loaded", phases: "Phases | None") -> None:
    """The first screen: where, what, how large, how long it took, and what to try."""
    model = loaded.service.model
    body = json.dumps({"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20}})
    chat = json.dumps({"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True})
    console.print(f"\n[bold]{model.name}[/bold] on [bold]{address}[/bold]", highlight=False)
    console.print(f"  runs on   {loaded.device}", highlight=False)
    console.print(f"  memory    {loaded.cache}", highlight=False)
    console.print(f"  start     {phases}", highlight=False)
    console.print("  try       ", end="")
    curl = f"curl -N {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{chat}'"
    print(curl, file=sys.stderr)
    print(
        f"            curl {address}/generate -H 'Content-Type: application/json' -d '{body}'\n",
        file=sys.stderr,
    )
