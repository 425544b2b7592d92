"""The process in which chat templates render, run as a script: a request a line in, an answer a line out.

A template is code from a download. Jinja's sandbox keeps it from the machine, but not from running for ever
or filling the memory; the kernel does, and ends this process. Knows Jinja and the standard library only.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 8 * 1024 * 1024
"""Of a prompt: several times what the largest body with the longest context may hold."""
OUT_OF_MEMORY = 3
"""The exit status that says so."""


def make_environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    # Jinja's own `tojson` escapes for HTML, and its lipsum makes endless text.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]
    return environment


class _Refused(Exception):
    """What a template says by `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, but what it forbids is an error at once; Jinja gives an empty value first."""

    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} object is not for templates")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as declared by Jinja

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


# Each process sees one template, time and again.
_compiled = lru_cache(maxsize=1)(make_environment().from_string)


def answer(source: str, values: Mapping[str, Any] | None) -> dict[str, str]:
    """Render, or without values only compile: the `text`, or in one line the `error`."""
    happened = "cannot be read"
    try:
        template = _compiled(source)
        happened = "failed"
        text = "" if values is None else template.render(values)
    except MemoryError:
        raise
    except _Refused as refusal:
        return {"error": " ".join(str(refusal).split())[:300]}
    except Exception as error:
        place = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        words = " ".join(str(error).split())[:300]
        return {"error": f"The chat template {happened}{place}: {type(error).__name__}: {words}"}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"The chat template writes more than {MAX_CHARACTERS:,} characters."}
    return {"text": text}


def main(seconds: float, memory: int) -> None:
    """Answer until the server closes its end, within so much computing for a request and so many bytes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # for the server, at whose end we end
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        # No handler: SIGPROF ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            request = json.loads(line)
            reply = json.dumps(answer(request["source"], request["values"])).encode()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
