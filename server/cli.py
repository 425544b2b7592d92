"""The command line: `rivulet serve`, `generate`, `inspect` and `bench`.

What needs torch is imported within a command: help and mistakes answer at once.
"""

import asyncio
import sys
from collections.abc import Sequence

from rich.console import Console

from model.errors import ModelError
from model.lean import import_torch
from server.config import (
    BenchSettings,
    GenerateSettings,
    InspectSettings,
    InvalidSettings,
    ServeSettings,
    parse_settings,
)
from server.exits import ExitStatus
from server.logs import configure
from server.phases import Phases

USAGE = """usage: rivulet COMMAND [options]

commands:
  serve           serve a model over HTTP: TGI's /generate and OpenAI's /v1
  generate TEXT   stream one answer to the terminal
  inspect MODEL   what a model is, what it takes and how fast it should run here; loads nothing
  bench           load a server with streams, ours or another, and measure it

`rivulet COMMAND --help` shows the options; each is also a RIVULET_* variable (of bench: RIVULET_BENCH_*)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"serve": serve, "generate": generate, "inspect": inspect, "bench": bench}
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return ExitStatus.ENDED if given else ExitStatus.WRONG_CALL
    if given[0] not in commands:
        print(f"rivulet: there is no command {given[0]!r}\n\n{USAGE}", file=sys.stderr)
        return ExitStatus.WRONG_CALL
    try:
        return commands[given[0]](given[1:])
    except ModelError as error:
        print(f"rivulet: {error}", file=sys.stderr)
        return ExitStatus.CANNOT_SERVE
    except InvalidSettings as error:
        print(f"rivulet {given[0]}: {error}", file=sys.stderr)
        return ExitStatus.WRONG_CALL
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def serve(arguments: Sequence[str]) -> int:
    """Serve the model until a signal or a fault."""
    settings = parse_settings(ServeSettings, arguments, "rivulet serve")
    configure(settings.log_level, settings.log_format)
    from server import process
    from server.edge.access import announce

    announce(settings)
    return process.serve(settings, Console(stderr=True))


def generate(arguments: Sequence[str]) -> int:
    """Stream one answer to standard output."""
    settings = parse_settings(GenerateSettings, arguments, "rivulet generate")
    configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    console = Console(stderr=True)
    import_torch()
    from server.service import Limits
    from server.startup import load
    from server.terminal import answer

    loaded = load(settings, console, Phases(), Limits())
    return asyncio.run(answer(loaded.service, settings, console))


def inspect(arguments: Sequence[str]) -> int:
    """Print what is to be known of a model before it is served."""
    settings = parse_settings(InspectSettings, arguments, "rivulet inspect")
    import_torch()
    from server import inspection

    return inspection.inspect(settings, Console(), Console(stderr=True))


def bench(arguments: Sequence[str]) -> int:
    """Load a server and print what it did; the last line is JSON."""
    settings = parse_settings(BenchSettings, arguments, "rivulet bench")
    from server.bench import measure

    return asyncio.run(measure(settings, Console(), Console(stderr=True)))
