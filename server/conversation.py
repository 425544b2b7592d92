"""From a conversation to what the model reads, and from its text to the pieces of its answer.

Knows no wire format: every chat dialect makes a Conversation of its body, and words the pieces itself.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.errors import TEMPLATE, VALIDATION, RequestError
from server.generation import Generation, TextOutput
from server.service import Service
from server.text.chat_template import TemplateError, opens_reasoning
from server.text.grammar import Grammar, GrammarSpec
from server.text.message_parser import MessageParser, Piece, ToolCall
from server.text.tools import (
    Tool,
    ToolChoice,
    ToolError,
    ToolStyle,
    call_grammar,
    read_choice,
    read_tools,
    with_tools_prompt,
)

NO_CALLS = ToolChoice("none")


@dataclass(frozen=True, slots=True)
class Structure:
    """What an answer must match."""

    spec: GrammarSpec
    field: str
    """Who asked for it, on the wire."""


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a conversation; a model that must not call any is shown none."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = NO_CALLS
    parallel: bool = True
    """Whether one answer may call several times; the calls after the first are dropped if not."""

    @classmethod
    def read(
        cls,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str | Mapping[str, Any] | None,
        parallel: bool | None,
    ) -> "Toolbox":
        """Validate OpenAI's three fields (RequestError)."""
        try:
            read = read_tools(tools or ())
        except ToolError as error:
            raise RequestError(VALIDATION, str(error), param="tools") from None
        try:
            return cls(read, read_choice(choice, read), parallel is not False)
        except ToolError as error:
            raise RequestError(VALIDATION, str(error), param="tool_choice") from None

    @property
    def shown(self) -> tuple[Tool, ...]:
        """What the model may call."""
        return () if self.choice.mode == "none" else self.tools


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be answered, and what the answer may be."""

    messages: Sequence[Mapping[str, Any]]
    """Plain values, as chat templates take them."""
    toolbox: Toolbox = Toolbox()
    structure: Structure | None = None
    template_values: Mapping[str, Any] = field(default_factory=dict)
    """The template's own, such as `enable_thinking`."""

    async def turn(self, service: Service) -> "Turn":
        """Render, encode and compile (RequestError)."""
        tools, template = self.toolbox.shown, service.chat_template
        if tools and self.structure is not None:
            message = f"`{self.structure.field}` does not go with tools that may be called"
            raise RequestError(VALIDATION, message, param=self.structure.field)
        if template is not None:
            try:
                template.check_values(self.template_values)
            except TemplateError as error:
                raise RequestError(TEMPLATE, str(error), param="chat_template_kwargs") from None
        style = None if template is None else template.tool_style
        messages = self.messages
        if style is None:
            messages = with_tools_prompt(messages, tools)
        declared = [_declaration(tool) for tool in tools] if tools and style is not None else None
        text = await service.render_chat(messages, declared, self.template_values)
        token_ids = await service.encode(text, add_special_tokens=False)
        if not token_ids:
            raise RequestError(VALIDATION, "the messages make an empty prompt", param="messages")
        inside = opens_reasoning(text)
        # A structure leaves no room for tags of the model's own, and its blanks are part of the text.
        thinks = template is not None and template.thinks and self.structure is None
        grammar, called = None, style or ToolStyle.TAGS
        if self.structure is not None:
            spec = replace(self.structure.spec, inside_reasoning=inside)
            grammar = await service.compile(spec, self.structure.field)
        elif (required := self._calls(called, inside)) is not None:
            grammar = await service.compile(required, "tools")
        return Turn(self.toolbox, token_ids, grammar, called if tools else None, thinks, inside)

    def _calls(self, style: ToolStyle, inside_reasoning: bool) -> GrammarSpec | None:
        """The form of an answer that must be a call."""
        box = self.toolbox
        try:
            return call_grammar(
                box.shown, box.choice, style, parallel=box.parallel, inside_reasoning=inside_reasoning
            )
        except ToolError as error:
            raise RequestError(VALIDATION, str(error), param="tools") from None


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation as the model reads it, to be answered any number of times."""

    toolbox: Toolbox
    token_ids: tuple[int, ...]
    grammar: Grammar | None
    tool_style: ToolStyle | None
    thinks: bool
    inside_reasoning: bool

    async def outputs(self, generation: Generation) -> AsyncIterator[tuple[TextOutput, list[Piece]]]:
        """A generation's outputs, each with the pieces that are certain with it."""
        parsers: dict[int, MessageParser] = {}
        called: set[int] = set()
        async for output in generation:
            parser = parsers.get(output.choice)
            if parser is None:
                parser = parsers[output.choice] = MessageParser(
                    tool_style=self.tool_style, thinks=self.thinks, inside_reasoning=self.inside_reasoning
                )
            pieces = parser.push(output.text)
            if output.finish is not None:
                pieces += parser.flush()
            kept = []
            for piece in pieces:
                if isinstance(piece, ToolCall):
                    if output.choice in called and not self.toolbox.parallel:
                        continue
                    called.add(output.choice)
                kept.append(piece)
            yield output, kept


def _declaration(tool: Tool) -> dict[str, Any]:
    """A tool as templates take it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
