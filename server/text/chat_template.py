"""Chat messages -> the prompt text that a model was trained on, by the Jinja template in the model's folder.

A template is code from a download: it runs in Jinja's sandbox, in another process (see renderer.py), and sees
plain values only. The text holds the special tokens already: encode it with `add_special_tokens=False`, or
it begins with a second BOS.
"""

import json
import re
from collections.abc import Mapping, Sequence

from server.text.renderer import Renderer, TemplateError
from server.text.template_process import make_environment
from server.text.tools import ToolStyle

__all__ = ["ChatTemplate", "TemplateError", "opens_reasoning"]

MAX_VALUES = 1000
MAX_VALUE_TEXT = 64 * 1024


class ChatTemplate:
    """One model's chat template, compiled."""

    thinks: bool
    """Whether the model writes its reasoning between `<think>` and `</think>`."""
    tool_style: ToolStyle | None
    """How the model writes tool calls; None if the template knows no tools."""

    def __init__(self, source: str, bos_token: str, eos_token: str, renderer: Renderer | None = None) -> None:
        """Read the template (TemplateError); it renders in `renderer`, or in one of its own."""
        self.thinks = "<think>" in source
        self.tool_style = _tool_style(source)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._reserved = {"messages", "tools", "add_generation_prompt", *self._tokens}
        self._reserved |= make_environment().globals.keys()
        self._source = source
        self._renderer = renderer or Renderer()
        self._renderer.render(source, None)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **values: object,
    ) -> str:
        """Write the messages as the model's prompt.

        Messages, tools and the template's own `values` (such as `enable_thinking`) are plain JSON values.
        Raises TemplateError if the template refuses them, fails or takes too long, or if a value has a name
        that is taken.
        """
        own = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        self.check_values(values)
        own["messages"] = [_plain_message(message) for message in messages]
        # `documents` is a name that templates test; transformers passes it in any case.
        return self._renderer.render(self._source, {"documents": None, **self._tokens, **values, **own})

    def check_values(self, values: Mapping[str, object]) -> None:
        """Check a client's `chat_template_kwargs` (TemplateError), before they are spread out for `render`.

        Plain JSON values of at most MAX_VALUES parts and MAX_VALUE_TEXT characters; no name that is taken.
        """
        if taken := sorted(values.keys() & self._reserved):
            raise TemplateError(f"The chat template's {taken[0]} is set by the server.")
        parts, characters = 0, 0
        waiting: list[object] = [dict(values)]
        while waiting:
            value = waiting.pop()
            match value:
                case str():
                    characters += len(value)
                case dict():
                    waiting += [*value, *value.values()]
                case list():
                    waiting += value
                case int() if value.bit_length() > 64:
                    raise TemplateError("The chat template's values hold an integer beyond 64 bits.")
                case int() | float() | None:
                    pass
                case _:
                    raise TemplateError(f"The chat template's values hold a {type(value).__name__}.")
            parts += 1
            if parts + len(waiting) > MAX_VALUES or characters > MAX_VALUE_TEXT:
                raise TemplateError("The chat template's values are too many or too long.")


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends with an open `<think>`, so that the answer begins inside it."""
    return prompt.rstrip().endswith("<think>")


def _tool_style(source: str) -> ToolStyle | None:
    if not re.search(r"\btools\b", source):
        return None
    if "<tool_call>" in source:
        return ToolStyle.TAGS
    # Llama 3's templates show the form of a call, and those of 3.1 and 3.3 name the tag as well.
    if "<|python_tag|>" in source or re.search(r'"parameters\\?"\s*:', source):
        return ToolStyle.BARE_JSON
    return None


def _plain_message(message: Mapping[str, object]) -> Mapping[str, object]:
    """A message as templates expect it: no null for content, and the arguments of calls as objects."""
    if message.get("content", "") is None:
        message = {**message, "content": ""}
    calls = message.get("tool_calls")
    return (
        {**message, "tool_calls": [_plain_call(call) for call in calls]}
        if isinstance(calls, list)
        else message
    )


def _plain_call(call: object) -> object:
    match call:
        case {"function": {"arguments": str(text), **function}, **rest}:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                return call
            if isinstance(arguments, dict):
                return {**rest, "function": {**function, "arguments": arguments}}
    return call
