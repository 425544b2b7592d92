"""A load of streams for any OpenAI or TGI address: sends prompts, notes when each event came.

Knows nothing of statistics or screens. While streams run their bytes are only kept with their times; they are
read when all is over, so that the client takes little of the processor that it shares with the server.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from server.bench_http import Address, Response, exchange

COMMON = (
    "time work life hand part year week case fact home word book side kind head game line city name team "
    "idea body back face door hour road form food land song love wall tree fire snow rain wind ship bird "
    "fish horn gold iron salt milk wine corn rice meat farm bank shop club park hill lake moon star king "
    "laws look make take come give find tell call feel turn show play move live hold lead stop open walk "
    "grow read wait send stay fall kill pass sell pull want need know help talk said went long good best "
    "high next last full free blue dark cold warm soft hard slow fast rich poor deep wide easy late real "
    "able true only once even also just most much many some such very well down over then than when what"
)
"""Words of four letters: one token in most vocabularies, five to a byte tokenizer, for even lengths."""

MOST_ERROR_CHARACTERS = 300


class BenchError(Exception):
    """What keeps a load from being measured, as one sentence."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    clients: int
    """Streams side by side; each sends its next request when its last one ended."""
    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: times in seconds of the same clock."""

    started: float
    arrivals: tuple[float, ...]
    """Of the events with text; at least one."""
    ended: float
    """The last event that belongs to a token."""
    prompt_tokens: int | None
    """By the server's count, where it tells."""
    output_tokens: int
    """By the server's count; else the number of events."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream, read."""

    has_text: bool = False
    of_token: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Dialect(Protocol):
    """A wire format of streams."""

    name: str
    path: str
    model: str | None

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """What to post."""

    def read(self, data: dict[str, Any]) -> Event:
        """One event's JSON."""


class OpenAI:
    """/v1/completions."""

    name = "openai"
    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        self.model: str | None = model
        self.extras: dict[str, Any] = {"ignore_eos": True}
        """What OpenAI's own API lacks; some servers refuse what they do not know."""

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """A greedy stream that ignores the end of text and ends with its usage."""
        return self.extras | {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, data: dict[str, Any]) -> Event:
        """A chunk with text, with the end's reason or with the usage, or several of these."""
        choices = data.get("choices") or []
        usage = data.get("usage") or {}
        has_text = any(choice.get("text") for choice in choices)
        of_token = has_text or any(choice.get("finish_reason") for choice in choices)
        return Event(has_text, of_token, usage.get("prompt_tokens"), usage.get("completion_tokens"))


class TGI:
    """/generate_stream."""

    name = "tgi"
    path = "/generate_stream"
    model: str | None = None

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """A greedy stream with details; TGI itself knows no `ignore_eos` and passes over it."""
        parameters = {
            "max_new_tokens": output_tokens,
            "do_sample": False,
            "details": True,
            "ignore_eos": True,
        }
        return {"inputs": prompt, "parameters": parameters}

    def read(self, data: dict[str, Any]) -> Event:
        """One token, with or without text; the last one has the details."""
        details = data.get("details") or {}
        is_token = bool(data.get("token"))
        return Event(is_token, is_token, details.get("input_length"), details.get("generated_tokens"))


async def find_dialect(address: Address, api: str, model: str | None) -> Dialect:
    """The address's dialect and model (BenchError); `api` as in the settings."""
    if api == "tgi":
        return TGI()
    if api == "openai" and model is not None:
        return OpenAI(model)
    answer = await exchange(address, "GET", "/v1/models")
    try:
        names = [entry["id"] for entry in json.loads(answer.body)["data"]] if answer.success else []
    except (ValueError, TypeError, KeyError):
        names = []
    if names:
        return OpenAI(model or names[0])
    if api == "openai":
        raise BenchError("/v1/models names no model; give one by --model")
    return TGI()


class Prompts:
    """Prompts of one length that no prefix cache has seen: common words in random order."""

    def __init__(self, words: int) -> None:
        self._count = words
        self._words = COMMON.split()
        self._random = random.Random()

    def make(self) -> str:
        """A new prompt."""
        return " ".join(self._random.choices(self._words, k=self._count))


async def calibrate(address: Address, dialect: Dialect, tokens: int) -> Prompts:
    """Find how many words make the tokens by the server's count of two prompts; one each if it tells none."""
    few = 4
    try:
        short = await _count(address, dialect, few)
    except BenchError as error:
        if not (isinstance(dialect, OpenAI) and "ignore_eos" in str(error)):
            raise
        dialect.extras = {}
        short = await _count(address, dialect, few)
    if not short:
        return Prompts(tokens)
    many = max(2 * few, round(tokens * few / short))
    long = await _count(address, dialect, many)
    if long is None or long <= short:
        return Prompts(tokens)
    per_word = (long - short) / (many - few)
    return Prompts(max(1, few + round((tokens - short) / per_word)))


async def _count(address: Address, dialect: Dialect, words: int) -> int | None:
    """The tokens of a prompt of so many words."""
    return read(dialect, await _stream(address, dialect, Prompts(words).make(), 1)).prompt_tokens


async def run(
    address: Address, dialect: Dialect, load: Load, prompts: Prompts, progress: Callable[[int], None]
) -> list[Response]:
    """Send the load and keep what comes; `progress` gets the number of requests that were answered.

    Raises BenchError for a refusal, and what `exchange` raises.
    """
    waiting = iter([prompts.make() for _ in range(load.requests)])
    streams: list[Response] = []

    async def client() -> None:
        for prompt in waiting:
            streams.append(await _stream(address, dialect, prompt, load.output_tokens))
            progress(len(streams))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(load.clients, load.requests)):
                group.create_task(client())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return streams


async def _stream(address: Address, dialect: Dialect, prompt: str, output_tokens: int) -> Response:
    """One request's answer, unread (BenchError if it is a refusal)."""
    answer = await exchange(address, "POST", dialect.path, dialect.body(prompt, output_tokens))
    if not answer.success:
        raise BenchError(_refusal(answer))
    return answer


def _refusal(answer: Response) -> str:
    """The server's own words, from either dialect's error body."""
    text = answer.body.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, TypeError, KeyError):
        pass
    text = " ".join(text.split())[:MOST_ERROR_CHARACTERS]
    return f"the server answered {answer.status} {answer.reason}: {text}"


def _events(stream: Response) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time of the piece that completed its line."""
    rest = b""
    for arrived, piece in stream.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield arrived, line[5:].strip()


def read(dialect: Dialect, stream: Response) -> Answer:
    """What the events say (BenchError for an event with an error, and for a stream without tokens)."""
    arrivals: list[float] = []
    ended = None
    prompt_tokens = output_tokens = None
    for arrived, line in _events(stream):
        if line == b"[DONE]":
            continue
        try:
            data = json.loads(line)
        except ValueError:
            raise BenchError(f"the stream has an event that is no JSON: {line[:80]!r}") from None
        if not isinstance(data, dict) or "error" in data:
            raise BenchError(f"the stream ended with an error: {str(data)[:MOST_ERROR_CHARACTERS]}")
        event = dialect.read(data)
        if event.has_text:
            arrivals.append(arrived)
        if event.of_token:
            ended = arrived
        prompt_tokens = event.prompt_tokens or prompt_tokens
        output_tokens = event.output_tokens or output_tokens
    if ended is None:
        raise BenchError("the stream ended without a token")
    return Answer(
        stream.started,
        tuple(arrivals) or (ended,),
        ended,
        prompt_tokens,
        output_tokens or max(len(arrivals), 1),
    )
