"""Tools are validated by name, and a required call has a form that the parser reads back as that call."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import byte_tokenizer
from test_grammar import Walk

from server.text.grammar import GrammarCompiler, GrammarError
from server.text.message_parser import Content, MessageParser, Reasoning, ToolCall
from server.text.tokenizer import Tokenizer
from server.text.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    Tool,
    ToolChoice,
    ToolError,
    ToolStyle,
    call_grammar,
    read_choice,
    read_tools,
    with_tools_prompt,
)

TAGS, BARE = ToolStyle.TAGS, ToolStyle.BARE_JSON


def declare(name: Any = "f", parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = declare(
    "get-weather",
    {
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Köln", 'a"b\\']}},
    },
    description="The weather",
)
TIME = declare("time", {"description": "%json or %llguidance", "additionalProperties": False})
TOOLS = read_tools([WEATHER, TIME])
CALLS = {
    TAGS: '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    BARE: '{"name": "%s", "parameters": %s}',
}
COLOGNE = '{"city": "Köln", "days": 2}'


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Walk]:
    folder: Path = tmp_path_factory.mktemp("tools")
    byte_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    compiler = GrammarCompiler(tokenizer)
    return lambda spec: Walk(compiler.compile(spec), tokenizer)


def test_tools_are_read() -> None:
    assert [tool.name for tool in TOOLS] == ["get-weather", "time"]
    assert TOOLS[0].description == "The weather"
    assert TOOLS[0].parameters["type"] == "object"
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert read_tools([declare("f")]) == (Tool("f", "", nothing),)
    assert read_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([declare("a"), declare("b"), declare("a")], "two tools have the name 'a'"),
        ([{"type": "retrieval"}], "type is 'function', not 'retrieval'"),
        ([{}], "type is 'function', not None"),
        ([{"type": "function"}], "object `function`"),
        ([declare("")], "letters, digits.*not ''"),
        ([declare("a b")], "not 'a b'"),
        ([declare("a\n")], "not 'a"),
        ([declare("é")], "not 'é'"),
        ([declare("a" * 65)], "not 'aaa"),
        ([declare(5)], "not 5"),
        ([declare(parameters=[])], "parameters of function 'f' are not a JSON schema of type 'object'"),
        ([declare(parameters={"type": "array"})], "of type 'object'"),
        ([declare(description=5)], "description of function 'f' is not a text"),
        ([declare(f"f{i}") for i in range(MAX_TOOLS + 1)], f"{MAX_TOOLS} are the most"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tools: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ToolError, match=message):
        read_tools(tools)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "time"}}, ToolChoice("required", "time")),
    ],
)
def test_a_choice_is_read(choice: Any, expected: ToolChoice) -> None:
    assert read_choice(choice, TOOLS) == expected


def test_without_tools_only_none_can_be_chosen() -> None:
    assert read_choice(None, ()) == read_choice("none", ()) == ToolChoice("none")
    for choice in ("auto", "required", {"type": "function", "function": {"name": "time"}}):
        with pytest.raises(ToolError, match="needs `tools`"):
            read_choice(choice, ())


@pytest.mark.parametrize(
    "choice", ["any", {}, {"type": "function"}, {"type": "function", "function": {"name": "nope" * 100}}]
)
def test_a_wrong_choice_is_refused(choice: Any) -> None:
    with pytest.raises(ToolError) as caught:
        read_choice(choice, TOOLS)
    assert len(str(caught.value)) < 200


def test_only_a_required_call_has_a_form() -> None:
    for mode in ("none", "auto"):
        assert call_grammar(TOOLS, ToolChoice(mode), TAGS, parallel=True) is None


@pytest.mark.parametrize("style", [TAGS, BARE])
@pytest.mark.parametrize("name", [None, "get-weather"])
def test_a_required_call_is_one_that_the_parser_reads(
    walk: Callable[..., Walk], style: ToolStyle, name: str | None
) -> None:
    spec = call_grammar(TOOLS, ToolChoice("required", name), style, parallel=False)
    text = CALLS[style] % ("get-weather", COLOGNE)
    assert walk(spec).read(text).ended
    parser = MessageParser(tool_style=style)
    assert parser.push(text) + parser.flush() == [ToolCall("get-weather", COLOGNE)]
    quoted = walk(spec).read(CALLS[style] % ("get-weather", '{"city": "a\\"b\\\\"}'))
    assert quoted.ended
    other = CALLS[style] % ("time", "{}")
    assert walk(spec).accepts(other) is (name is None)


@pytest.mark.parametrize("style", [TAGS, BARE])
@pytest.mark.parametrize(
    "call",
    [
        ("get-weather", "{}"),
        ("get-weather", '{"city": "Bonn"}'),
        ("get-weather", '{"city": "Köln", "days": "2"}'),
        ("get-weather", '{"city": "Köln", "more": 1}'),
        ("time", '{"zone": 1}'),
        ("weather", "{}"),
    ],
)
def test_what_the_tools_do_not_allow_cannot_come(
    walk: Callable[..., Walk], style: ToolStyle, call: tuple[str, str]
) -> None:
    spec = call_grammar(TOOLS, ToolChoice("required"), style, parallel=False)
    assert not walk(spec).accepts(CALLS[style] % call)


def test_several_calls_come_only_if_they_may(walk: Callable[..., Walk]) -> None:
    call = CALLS[TAGS] % ("time", "{}")
    one, many = (
        call_grammar(TOOLS, ToolChoice("required"), TAGS, parallel=parallel) for parallel in (False, True)
    )
    assert walk(many).accepts("\n".join([call] * MAX_CALLS))
    assert not walk(many).accepts("\n".join([call] * (MAX_CALLS + 1)))
    assert not walk(many).read(call).ended
    assert walk(one).read(call).ended


def test_a_model_inside_its_reasoning_ends_that_first(walk: Callable[..., Walk]) -> None:
    spec = call_grammar(TOOLS, ToolChoice("required"), TAGS, parallel=False, inside_reasoning=True)
    text = "I call\n<tool_call>?\n</think>\n\n" + CALLS[TAGS] % ("time", "{}")
    assert walk(spec).read(text).ended
    parser = MessageParser(tool_style=TAGS, inside_reasoning=True)
    assert parser.push(text) == [Reasoning("I call\n<tool_call>?"), ToolCall("time", "{}")]
    assert not walk(spec).accepts("I call\n</think>\n\nno")


def test_parameters_that_cannot_be_held_are_told_by_name(walk: Callable[..., Walk]) -> None:
    spec = call_grammar(read_tools([declare("f", {"if": {}})]), ToolChoice("required"), TAGS, parallel=False)
    with pytest.raises(GrammarError, match='"if" is not supported'):
        walk(spec)


def test_a_template_without_tools_is_given_them_as_text() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Time?"}
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    turn = [
        user,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]
    first, *rest = with_tools_prompt([system, *turn], TOOLS)
    assert str(first["content"]).startswith("Be brief.\n\nYou can call functions.")
    assert rest == [
        user,
        {"role": "assistant", "content": CALLS[TAGS] % ("time", "{}")},
        {"role": "user", "content": "<tool_response>\n12:00\n</tool_response>"},
    ]
    lines = str(first["content"]).partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in TOOLS
    ]
    alone = with_tools_prompt([user], TOOLS)
    assert [message["role"] for message in alone] == ["system", "user"]
    assert with_tools_prompt([user], ()) == [user]


def test_the_example_in_the_prompt_is_in_the_form_that_is_read() -> None:
    shown = str(with_tools_prompt([], TOOLS)[0]["content"])
    example = shown[shown.rindex("<tool_call>") :].replace('"..."', '"time"').replace("{...}", "{}")
    parser = MessageParser(tool_style=TAGS)
    assert parser.push(example) == [ToolCall("time", "{}")]
    assert MessageParser(tool_style=TAGS).push("x") == [Content("x")]
