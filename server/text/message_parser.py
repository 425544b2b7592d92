"""A model's text, piece by piece -> content, reasoning and tool calls, in time linear in the text.

However the text is cut into pushes, the pieces add up to the same; only what could begin a tag waits.
Knows nothing about tokens or wire formats.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from server.text.tools import CALL_CLOSE, CALL_OPEN, NAME, ToolStyle

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text from between `<think>` and `</think>`."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call."""

    name: str
    arguments: str
    """A JSON object, as text."""


Piece = Content | Reasoning | ToolCall


class MessageParser:
    """Cuts one answer into its pieces.

    `thinks`: the model writes `<think>` tags. `inside_reasoning`: the prompt already opened one.
    `tool_style`: how it writes calls, None if the request has no tools (then a call is content).

    Reasoning stands at the beginning only, and so does bare JSON: elsewhere they are content. An answer in
    bare JSON's style that begins with `{` waits for the end of that object. Tags, the blanks around
    reasoning and those around calls are no part of any piece. What looks like a call and is none is content
    as it stands.
    """

    def __init__(
        self, *, tool_style: ToolStyle | None = None, thinks: bool = False, inside_reasoning: bool = False
    ) -> None:
        self._style = tool_style
        self._openers = _OPENERS[tool_style]
        self._step: _Step = self._begin
        self._pieces: list[Piece] = []
        self._held = ""  # what could begin a tag
        self._blanks: list[str] = []  # they are text if text follows, and dropped before a tag
        self._skip = False  # blanks that come next are dropped in any case
        self._raw: list[str] = []  # the call that is being read, its tag included
        self._object = _ObjectReader()
        if inside_reasoning:
            self._step, self._skip = self._reasoning, True
        elif thinks:
            self._openers = (THINK_OPEN, *self._openers)
        elif tool_style is None:
            self._step = self._plain

    def push(self, text: str) -> list[Piece]:
        """Take the next piece of text; give what is certain now."""
        text, self._held = self._held + text, ""
        while text:
            text = self._step(text)
        pieces, self._pieces = self._pieces, []
        return pieces

    def flush(self) -> list[Piece]:
        """End the text; give the rest. A call whose JSON never ended is content."""
        held, self._held = self._held, ""
        if self._raw:
            # An answer may end with the object, or inside the closing tag.
            self._raw.append(held)
            self._end_call(self._object.call(), "")
        elif self._step == self._reasoning:
            self._add(Reasoning, held)
        else:
            self._add(Content, held)
            self._give(Content, "".join(self._blanks))
        pieces, self._pieces = self._pieces, []
        return pieces

    # Each step takes text that is not empty and gives what remains for the next one.

    def _begin(self, text: str) -> str:
        """Before anything but blanks: is it reasoning, a call or content?"""
        start = text.lstrip(_BLANKS)
        if not self._skip:
            self._blanks.append(text[: len(text) - len(start)])
        if not start:
            return ""
        opener = next((tag for tag in self._openers if start.startswith(tag)), None)
        if opener is None and any(tag.startswith(start) for tag in self._openers):
            self._held = start
            return ""
        if opener == THINK_OPEN:
            self._blanks.clear()
            self._step, self._skip = self._reasoning, True
            return start[len(opener) :]
        if opener is not None:
            return self._open_call(opener, start[len(opener) :])
        self._step = self._content if self._style is ToolStyle.TAGS else self._plain
        return start

    def _reasoning(self, text: str) -> str:
        before, tag, after = self._search(text, THINK_CLOSE)
        self._add(Reasoning, before)
        if tag:
            self._blanks.clear()
            self._openers = _OPENERS[self._style]
            self._step, self._skip = self._begin, True
        return after

    def _content(self, text: str) -> str:
        """Text in which tagged calls may stand."""
        before, tag, after = self._search(text, CALL_OPEN)
        self._add(Content, before)
        return self._open_call(tag, after) if tag else after

    def _plain(self, text: str) -> str:
        """Text in which no call can come any more."""
        if self._blanks:
            text = "".join(self._blanks) + text
            self._blanks.clear()
        self._pieces.append(Content(text))
        return ""

    def _open_call(self, opener: str, rest: str) -> str:
        self._step = self._call
        self._object = _ObjectReader()
        if opener == "{":
            opener, rest = "", opener + rest
        self._raw = [opener]
        return rest

    def _call(self, text: str) -> str:
        """Blanks, a JSON object, and in a tagged call blanks and the closing tag."""
        end = self._object.feed(text)
        self._raw.append(text[:end])
        rest = text[end:]
        if self._object.failed:
            return self._end_call(None, rest)
        if not self._object.ended:
            return rest
        if self._style is ToolStyle.BARE_JSON:
            return self._end_call(self._object.call(), rest)
        start = rest.lstrip(_BLANKS)
        self._raw.append(rest[: len(rest) - len(start)])
        if start.startswith(CALL_CLOSE):
            self._raw.append(CALL_CLOSE)
            return self._end_call(self._object.call(), start[len(CALL_CLOSE) :])
        if CALL_CLOSE.startswith(start):
            self._held = start
            return ""
        return self._end_call(None, start)

    def _end_call(self, call: ToolCall | None, rest: str) -> str:
        raw, self._raw = "".join(self._raw), []
        tags = self._style is ToolStyle.TAGS
        if call is None:
            self._give(Content, "".join(self._blanks) + raw)
            self._step, self._skip = self._content if tags else self._plain, False
        else:
            self._pieces.append(call)
            self._step, self._skip = self._content if tags else self._begin, True
        self._blanks.clear()
        return rest

    def _search(self, text: str, tag: str) -> tuple[str, str, str]:
        """Text before the tag, the tag if it is there, and the rest; holds back what could begin it."""
        before, found, after = text.partition(tag)
        if not found:
            count = next((n for n in range(len(tag) - 1, 0, -1) if before.endswith(tag[:n])), 0)
            self._held = before[len(before) - count :]
            before = before[: len(before) - count]
        return before, found, after

    def _add(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """Give text but for the blanks at its end, which wait for what follows."""
        if self._skip:
            text = text.lstrip(_BLANKS)
        body = text.rstrip(_BLANKS)
        if body:
            self._skip = False
            self._give(kind, "".join(self._blanks) + body)
            self._blanks.clear()
        if len(body) < len(text):
            self._blanks.append(text[len(body) :])

    def _give(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if text:
            self._pieces.append(kind(text))


class _ObjectReader:
    """Finds the end of one JSON object, and reads the call in it."""

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self._text: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """Read on; the index after what belongs to the object."""
        if self.ended:
            return 0
        position = 0
        if not self._depth:
            position = len(text) - len(text.lstrip(_BLANKS))
            if position == len(text):
                return position
            self.failed = text[position] != "{"
            if self.failed:
                return position
        start = position
        if self._escaped:
            position, self._escaped = position + 1, False
        while match := (_IN_STRING if self._in_string else _OUTSIDE).search(text, position):
            position = match.end()
            match match[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = position == len(text)
                    position += 1
                case "{":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if not self._depth:
                        self.ended = True
                        self._text.append(text[start:position])
                        return position
        self._text.append(text[start:])
        return len(text)

    def call(self) -> ToolCall | None:
        """The call, if the object has ended and is one."""
        if not self.ended:
            return None
        try:
            value = json.loads("".join(self._text), strict=False)
            name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
            if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
                return None
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return None
        # A lone surrogate, which JSON can spell, could not be sent as it is.
        return ToolCall(name, text if text.isascii() or _is_unicode(text) else json.dumps(arguments))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_Step = Callable[[str], str]
_BLANKS = " \t\r\n"
_OPENERS = {None: (), ToolStyle.TAGS: (CALL_OPEN,), ToolStyle.BARE_JSON: (PYTHON_TAG, "{")}
_OUTSIDE, _IN_STRING = re.compile(r'[{}"]'), re.compile(r'["\\]')
