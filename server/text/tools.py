"""Tools that a model may call: what a client declares, and the grammar under which a model calls them.

A call is text in the model's own form, which the chat template tells; `message_parser` reads it back.
Knows no wire format beyond the tools' own JSON.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from server.text.grammar import GrammarSpec
from server.text.grammar_source import lark_string

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""A function's name, whole."""
MAX_TOOLS = 128
MAX_CALLS = 16
"""In one answer that a grammar holds, so that a small model cannot go on calling."""


class ToolError(ValueError):
    """Tools or a choice of tools that cannot be used; the text says why, for the client to read."""


class ToolStyle(Enum):
    """How a model writes a call."""

    TAGS = "tags"
    """`<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`: Qwen, Hermes, MiniMind."""
    BARE_JSON = "bare_json"
    """`{"name": ..., "parameters": {...}}` and nothing else: Llama 3."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON schema of type object."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a model must call, and what."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    """The one function that may be called, if `required`; None for any."""


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Validate the wire's `tools` (ToolError)."""
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"there are {len(tools)} tools, and {MAX_TOOLS} are the most")
    read = tuple(_read_tool(tool) for tool in tools)
    seen: set[str] = set()
    for tool in read:
        if tool.name in seen:
            raise ToolError(f"two tools have the name {tool.name!r}")
        seen.add(tool.name)
    return read


def _read_tool(tool: Mapping[str, Any]) -> Tool:
    if tool.get("type") != "function":
        raise ToolError(f"a tool's type is 'function', not {_shown(tool.get('type'))}")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise ToolError("a tool has an object `function`")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ToolError(
            f"a function's name is 1 to 64 letters, digits, '_' and '-' of ASCII, not {_shown(name)}"
        )
    if not isinstance(description, str | None):
        raise ToolError(f"the description of function {name!r} is not a text")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ToolError(f"the parameters of function {name!r} are not a JSON schema of type 'object'")
    return Tool(name, description or "", {"type": "object", **parameters})


def read_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> ToolChoice:
    """Validate the wire's `tool_choice` (ToolError); None means auto with tools and none without."""
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice == "none":
        return ToolChoice("none")
    if not tools:
        raise ToolError("a choice of tools needs `tools`")
    match choice:
        case "auto":
            return ToolChoice("auto")
        case "required":
            return ToolChoice("required")
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in {tool.name for tool in tools}:
                raise ToolError(f"there is no function {_shown(name)} among the tools")
            return ToolChoice("required", name)
    raise ToolError(
        "a choice of tools is 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": ...}}'
    )


def call_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    style: ToolStyle,
    *,
    parallel: bool,
    inside_reasoning: bool = False,
) -> GrammarSpec | None:
    """The form of the whole answer if a call is required, else None.

    With `parallel` one call or several, without exactly one; bare JSON is one call in any case. If the
    prompt leaves the model `inside_reasoning`, it ends that first.
    """
    if choice.mode != "required":
        return None
    key = "arguments" if style is ToolStyle.TAGS else "parameters"
    calls, rules = [], []
    for index, tool in enumerate(tools):
        if choice.name in (None, tool.name):
            # The schema stands alone, so that its `$ref`s still lead from its own root.
            head = lark_string(f'{{"name": "{tool.name}", "{key}": ')
            calls.append(f"call{index}")
            # A description may hold what means something in a grammar, which begins with "%".
            schema = json.dumps(tool.parameters).replace("%", "\\u0025")
            rules.append(f'call{index}: {head} %json {schema} "}}"')
    if style is ToolStyle.TAGS:
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel else ""
        head, tail = lark_string(CALL_OPEN + "\n"), lark_string("\n" + CALL_CLOSE)
        form = [f"start: call{more}", f"call: {head} ({' | '.join(calls)}) {tail}"]
    else:
        form = [f"start: {' | '.join(calls)}"]
    return GrammarSpec("lark", "\n".join([*form, *rules]), inside_reasoning)


def tools_prompt(tools: Sequence[Tool]) -> str:
    """A system text that shows the tools to a model whose template cannot (`ToolStyle.TAGS`)."""
    shown = [
        {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
        for tool in tools
    ]
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in shown)
    return (
        f"You can call functions. These exist, one to a line:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with its name and arguments in this form:\n"
        f'{CALL_OPEN}\n{{"name": "...", "arguments": {{...}}}}\n{CALL_CLOSE}'
    )


def with_tools_prompt(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Tool]
) -> list[Mapping[str, object]]:
    """The messages as a template that knows no tools can write them.

    `tools_prompt` ends their first system message, or becomes it; calls and their results become text.
    """
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    prompt = tools_prompt(tools)
    if plain and plain[0].get("role") == "system":
        first = {**plain[0], "content": f"{plain[0].get('content') or ''}\n\n{prompt}".lstrip("\n")}
        return [first, *plain[1:]]
    return [{"role": "system", "content": prompt}, *plain]


def _as_text(message: Mapping[str, object]) -> Mapping[str, object]:
    """A call or a result as text."""
    content = message.get("content") or ""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or not calls:
        return message
    texts = [str(content)] if content else []
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(function["name"])
        texts.append(f'{CALL_OPEN}\n{{"name": {name}, "arguments": {arguments}}}\n{CALL_CLOSE}')
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}


def _shown(value: object) -> str:
    """A wrong value, cut so that an error does not repeat a whole request."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
