"""What a client writes for a grammar -> llguidance's own text, and llguidance's errors -> one sentence.

Refuses what llguidance would take too long for, or take in and ignore.
"""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NoReturn

# White space between JSON's parts: none, one space, or a line break with its indentation. Without a bound a
# small model that finds blanks likely writes them until it has no tokens left.
WHITESPACE = r"[ ]|\n[ \t]{0,24}"

# Numbers are divided by an automaton with a state for each remainder, and several by their common multiple.
MAX_MULTIPLE = 10_000

# An error at the end of a chain of rules is told again at each of them: 3000 lines took 12 s.
MAX_LARK_LINES = 1000

# Where only one text can follow, llguidance would allow nothing but the tokens that the tokenizer makes of
# it, special ones and SentencePiece's first space included. So the model chooses among the tokens that fit.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

_JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}


class GrammarError(ValueError):
    """A grammar that cannot be used; the text says why, for the client to read."""


def source(kind: str, value: str, *, inside_reasoning: bool) -> str:
    """A grammar of a GrammarSpec's kind as llguidance takes it (GrammarError)."""
    import llguidance  # with the first grammar: most servers never see one

    match kind:
        case "json_schema":
            lark = f"start: {_lark_schema(_json(value))}"
        case "json_object":
            lark = f"start: {_lark_schema({'type': 'object'})}"
        case "regex":
            lark = f"start: /{llguidance.regex_to_lark(value, use_ascii='')}/"
        case "choice":
            lark = f"start: {' | '.join(map(lark_string, _choices(value)))}"
        case _:
            lark = _checked_lark(value)
    if inside_reasoning:
        lark = _after_reasoning(lark)
    return llguidance.LLMatcher.grammar_from_lark(lark + _OPTIONS)


def _after_reasoning(lark: str) -> str:
    """Any text up to `</think>` and some blanks, then the grammar."""
    name, count = re.subn(r"^start(?=\s*[:\[])", "answer", lark, flags=re.MULTILINE)
    if count != 1 or re.search(r"^answer\b", lark, re.MULTILINE):
        raise GrammarError("it has one rule `start` and none `answer`, if the model reasons first")
    reasoning = 'reasoning[suffix="</think>"]: /(?s:.*)/\nBLANKS: /[ \\t\\r\\n]{0,2}/\n'
    return f"start: reasoning BLANKS answer\n{reasoning}{name}"


def _lark_schema(schema: object) -> str:
    """A JSON schema as a part of a Lark rule, with our options."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise GrammarError("it is not an object")
    _check_schema(schema)
    # Where a schema brings options of its own, ours stand in their place.
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _choices(value: str) -> dict[str, None]:
    choices = _json(value)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise GrammarError("it is not a list of one text at least")
    return dict.fromkeys(choices)


def lark_string(text: str) -> str:
    """A text as a Lark literal, which is a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _checked_lark(text: str) -> str:
    """The grammar with our options in each of its schemas."""
    if text.count("\n") >= MAX_LARK_LINES:
        raise GrammarError(f"it has more than {MAX_LARK_LINES} lines")
    if option := re.search(r"^[^\"#/]*\[[^\]\"]*\b(temperature)\b", text, re.MULTILINE):
        raise GrammarError(f"`{option[1]}` is not supported in a grammar")
    if "%llguidance" in text:
        raise GrammarError("`%llguidance` is not supported in a grammar")
    parts, position = [], 0
    while (start := text.find("%json", position)) >= 0:
        begin = start + len("%json")
        while text[begin : begin + 1].isspace():
            begin += 1
        try:
            schema, end = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text, begin)
        except (ValueError, RecursionError):
            raise GrammarError("%json is followed by a JSON schema, an object") from None
        parts += [text[position:start], _lark_schema(schema)]
        position = end
    return "".join([*parts, text[position:]])


def _check_schema(schema: object) -> None:
    """Refuse divisors whose automaton would take long."""
    multiple = 1
    for divisor in _divisors(schema):
        # A number's automaton counts in units of the divisor's last decimal: 0.05 needs what 5 needs.
        _, digits, exponent = Decimal(str(divisor)).as_tuple()
        assert isinstance(exponent, int), "JSON has no infinity"
        units = int("".join(map(str, digits))) * 10 ** max(exponent, 0)
        multiple = math.lcm(multiple, units or 1)
        if multiple > MAX_MULTIPLE:
            raise GrammarError(f"its `multipleOf` have a common multiple above {MAX_MULTIPLE}")


def _divisors(schema: object) -> Iterator[int | float]:
    """Whatever stands under `multipleOf`, anywhere."""
    waiting = [schema]
    while waiting:
        match waiting.pop():
            case dict() as value:
                divisor = value.get("multipleOf")
                if isinstance(divisor, int | float) and not isinstance(divisor, bool):
                    yield divisor
                waiting.extend(value.values())
            case list() as value:
                waiting.extend(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise GrammarError(f"it is not valid JSON, {reason}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


# llguidance's words -> ours, which say what to do; a match anywhere replaces the whole text.
_REWORDED = (
    (r"Unsatisfiable schema: (.*)", r"no text matches it: \1"),
    (
        r"Resource '(.*?)' is not present",
        r"`$ref` to \1 is not followed: only parts of the schema itself are",
    ),
    (r"Unimplemented keys: \[(.*)\]", r"\1 is not supported"),
    (
        r"oneOf constraints",
        "`oneOf` is not supported unless its parts clearly exclude each other: use `anyOf`",
    ),
    (r"NoExtension", "no text matches it"),
    (
        r"(?i)too (?:many|big|large|deep)|exhausted|precomputation failed|\d items; max|recursion limit"
        r"|stack level",
        "it is too complex",
    ),
    (r"regex parse error:[^\0]*\nerror: (.*)", r"a regular expression in it cannot be read: \1"),
    (r"^(?:at )?(\d+)\(\d+\): (?:at EOF: )?(.*)", r"line \1: \2"),
)


def readable_error(text: str) -> str:
    """What llguidance says, as a sentence for a client, without places in its own sources."""
    for pattern, ours in _REWORDED:
        if match := re.search(pattern, text):
            text = match.expand(ours)
            break
    line = text.strip().partition("\n")[0][:300]
    return "llguidance failed on it" if not line or re.search(r"\.rs\b|panic", line) else line
