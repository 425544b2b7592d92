"""The seeded mix of proper calls, over every dialect: what is asked, and what the answer must be."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import jsonschema

from soak.dialects import DIALECTS, Body, Dialect, Text
from soak.fates import Wrong

WORDS = [
    "time",
    "work",
    "life",
    "hand",
    "part",
    "year",
    "week",
    "case",
    "fact",
    "home",
    "word",
    "book",
    "side",
    "kind",
    "head",
    "game",
    "line",
    "city",
    "name",
    "team",
    "idea",
    "body",
    "back",
    "face",
    "door",
    "hour",
    "road",
    "form",
    "food",
    "land",
    "song",
    "love",
    "wall",
    "tree",
    "fire",
    "snow",
    "rain",
    "wind",
    "ship",
    "bird",
    "fish",
    "horn",
]
ODD = ("😎", "漢字", "é", "<|im_end|>", "\u2028", '"\\', "\x00", "{{ x }}")
"""Parts of a prompt that are no mistake."""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "open": {"type": "boolean"},
    },
    "required": ["name", "count", "open"],
    "additionalProperties": False,
}
REGEX = "[a-f]{2,6}-[0-9]{2,4}"
CHOICES = ("yes", "no", "perhaps")

Check = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Call:
    """One call and what its answer must be."""

    dialect: Dialect
    stream: bool
    body: Body
    choices: int = 1
    check: Check | None = None
    """What a text must satisfy that the limit did not cut."""

    @property
    def path(self) -> str:
        """Where it goes."""
        return self.dialect.path(self.stream)

    def judge(self, texts: list[Text]) -> None:
        """Compare the answer with what was asked (Wrong)."""
        if len(texts) != self.choices:
            raise Wrong(f"{self.dialect.name}: {len(texts)} choices instead of {self.choices}")
        for text in texts:
            if self.check is not None and not text.cut and not self.check(text.text):
                raise Wrong(f"{self.dialect.name}: the structure does not hold: {text.text[:200]!r}")


def fits_schema(text: str) -> bool:
    """Whether a text is JSON as SCHEMA has it."""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def fits_regex(text: str) -> bool:
    """Whether a text matches REGEX as a whole."""
    return re.fullmatch(REGEX, text) is not None


def prompt(random: Random, words: int) -> str:
    """So many words, among them sometimes an odd one."""
    parts = random.choices(WORDS, k=words)
    if random.random() < 0.2:
        parts.insert(random.randrange(len(parts) + 1), random.choice(ODD))
    return " ".join(parts)


class Mix:
    """Makes calls for one model; the same Random gives the same calls."""

    def __init__(self, model: str) -> None:
        self._model = model

    def short(self, random: Random) -> Call:
        """A few words, a few tokens, and some of the extras."""
        call = self._plain(random, random.randint(1, 12), random.randint(1, 16))
        return self._with_extras(random, call) if random.random() < 0.7 else call

    def long(self, random: Random) -> Call:
        """A prompt of several chunks, or an output of many tokens."""
        words, tokens = (60, 24) if random.random() < 0.5 else (4, 160)
        call = self._plain(random, random.randint(words // 2, words), tokens)
        call.body.get("parameters", call.body)["ignore_eos"] = True
        return call

    def structured(self, random: Random) -> Call:
        """JSON by a schema, an expression, a choice, or a call of a tool."""
        call = self._plain(random, 6, 64)
        body, kind = call.body, random.choice(("schema", "regex", "choice", "tool"))
        check: Check = {"regex": fits_regex, "choice": CHOICES.__contains__}.get(kind, fits_schema)
        if call.dialect.name == "generate":
            regex = kind in ("regex", "choice")
            grammar = {"type": "regex", "value": REGEX} if regex else {"type": "json", "value": SCHEMA}
            body["parameters"]["grammar"] = grammar
            check = fits_regex if regex else fits_schema
        elif kind == "regex":
            body["structured_outputs"] = {"regex": REGEX}
        elif kind == "choice":
            body["structured_outputs"] = {"choice": list(CHOICES)}
        elif kind == "tool" and call.dialect.name != "completions":
            body |= _tools(call.dialect.name)
            check = fit_calls
        elif call.dialect.name == "chat":
            schema = {"name": "thing", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif call.dialect.name == "responses":
            body["text"] = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA}}
        else:
            body["structured_outputs"] = {"json": SCHEMA}
        return Call(call.dialect, call.stream, body, 1, check)

    def endless(self, random: Random, tokens: int) -> Call:
        """A stream that goes on to its limit."""
        dialect = random.choice(DIALECTS)
        body = dialect.body(self._model, prompt(random, 4), tokens, True)
        body.get("parameters", body)["ignore_eos"] = True
        return Call(dialect, True, body)

    def crowd(self, count: int, tokens: int, seed: int) -> list[Call]:
        """So many calls of OpenAI's completions, every other one a stream; no two prompts are the same."""
        random, (dialect,) = Random(seed), [one for one in DIALECTS if one.name == "completions"]
        bodies = [
            dialect.body(self._model, prompt(random, 8), tokens, bool(number % 2)) | {"ignore_eos": True}
            for number in range(count)
        ]
        return [Call(dialect, bool(number % 2), body) for number, body in enumerate(bodies)]

    def canaries(self) -> list[Call]:
        """Calls whose text is the same each time: greedy ones, and one that draws by a seed."""
        calls = [
            Call(dialect, stream, dialect.body(self._model, "The capital of France is", 12, stream))
            for dialect, stream in zip(DIALECTS, (True, False, True, False, True), strict=True)
        ]
        drawn = calls[1].body | {"temperature": 0.9, "seed": 7, "top_p": 0.9, "max_tokens": 16}
        return [*calls, Call(calls[1].dialect, False, drawn)]

    def _plain(self, random: Random, words: int, tokens: int) -> Call:
        dialect, stream = random.choice(DIALECTS), random.random() < 0.6
        return Call(dialect, stream, dialect.body(self._model, prompt(random, words), tokens, stream))

    def _with_extras(self, random: Random, call: Call) -> Call:
        """Sampling, a stop string, log-probabilities and several choices, as the dialect has them."""
        name, body, choices = call.dialect.name, dict(call.body), 1
        common = {
            "temperature": random.choice((0.5, 1.0)),
            "top_p": 0.9,
            "seed": random.randrange(1 << 40),
            "repetition_penalty": random.choice((1.0, 1.2)),
        }
        if name == "generate":
            extras = common | {"do_sample": True, "stop": ["\n\n"], "top_n_tokens": 3}
            if not call.stream and random.random() < 0.3:
                extras |= {"best_of": 2}
                del extras["seed"]
            body["parameters"] = body["parameters"] | extras
            return Call(call.dialect, call.stream, body)
        body |= common
        body["stop_sequences" if name == "messages" else "stop"] = ["\n\n"]
        if name in ("completions", "chat") and random.random() < 0.5:
            choices = body["n"] = 3
        if name == "completions":
            body["logprobs"] = 2
            if not call.stream and random.random() < 0.5:
                body["best_of"] = choices + 1
        if name == "chat":
            body |= {"logprobs": True, "top_logprobs": 2}
        return Call(call.dialect, call.stream, body, choices)


def _tools(dialect: str) -> Body:
    """One tool that must be called, as each of the chat dialects has it."""
    named = {"name": "note", "description": "Notes a thing."}
    if dialect == "messages":
        return {"tools": [named | {"input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    if dialect == "responses":
        tool = {"type": "function", "parameters": SCHEMA} | named
        return {"tools": [tool], "tool_choice": "required"}
    function = named | {"parameters": SCHEMA}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def fit_calls(text: str) -> bool:
    """Whether a text is what one or more calls of the tool were made with, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        if not fits_schema(json.dumps(value)):
            return False
    return at > 0
