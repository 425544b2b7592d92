"""A model's text comes apart into content, reasoning and calls, the same however it is cut."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.message_parser import Content, MessageParser, Piece, Reasoning, ToolCall
from server.text.tools import ToolStyle

TAGS, BARE = ToolStyle.TAGS, ToolStyle.BARE_JSON
SETTINGS = {
    "plain": {},
    "tags": {"tool_style": TAGS},
    "bare": {"tool_style": BARE},
    "thinks": {"thinks": True},
    "inside": {"inside_reasoning": True},
    "thinks and tags": {"thinks": True, "tool_style": TAGS},
    "inside and tags": {"inside_reasoning": True, "tool_style": TAGS},
    "thinks and bare": {"thinks": True, "tool_style": BARE},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
F = ToolCall("f", '{"x": 1}')


def parse(setting: str, *pushes: str) -> list[Piece]:
    """All pieces, with neighbours of one kind joined."""
    parser = MessageParser(**SETTINGS[setting])
    joined: list[Piece] = []
    for piece in [piece for text in pushes for piece in parser.push(text)] + parser.flush():
        last = joined[-1] if joined else None
        if isinstance(piece, ToolCall) or type(last) is not type(piece):
            joined.append(piece)
        else:
            joined[-1] = type(piece)(last.text + piece.text)
    return joined


@pytest.mark.parametrize(
    ("setting", "text", "pieces"),
    [
        ("plain", f"<think>a</think> {CALL} ", [Content(f"<think>a</think> {CALL} ")]),
        ("plain", '{"name": "f", "arguments": {}}', [Content('{"name": "f", "arguments": {}}')]),
        ("plain", " \n", [Content(" \n")]),
        ("tags", "", []),
        ("tags", " hello \n", [Content(" hello \n")]),
        ("tags", CALL, [F]),
        ("tags", f"\n{CALL}\n{CALL}\n", [F, F]),
        ("tags", f"I look.\n\n{CALL}", [Content("I look."), F]),
        ("tags", f"{CALL}\n\nDone.\n", [F, Content("Done.\n")]),
        ("tags", f"a < b <tool_ <tool_call{CALL}", [Content("a < b <tool_ <tool_call"), F]),
        ("tags", '<tool_call>{"name":"f"}</tool_call>', [ToolCall("f", "{}")]),
        ("tags", '<tool_call>{"name":"f","parameters":{"é":[]}}</tool_call>', [ToolCall("f", '{"é": []}')]),
        ("tags", '<tool_call>{"name":"f","arguments":{"x": 1}}', [F]),
        ("tags", '<tool_call>{"name":"f","arguments":{"x": 1}}\n</tool_', [F]),
        (
            "tags",
            '<tool_call>{"name":"f","arguments":{"x":"}</tool_call>{\\"<tool_call>\\\\"}}</tool_call>!',
            [ToolCall("f", '{"x": "}</tool_call>{\\"<tool_call>\\\\"}'), Content("!")],
        ),
        (
            "tags",
            '<tool_call>{"name":"f","arguments":{"x":"\\ud800"}}</tool_call>',
            [ToolCall("f", '{"x": "\\ud800"}')],
        ),
        ("tags", "<think>a</think>b", [Content("<think>a</think>b")]),
        ("bare", '{"name": "f", "parameters": {"x": 1}}', [F]),
        ("bare", ' <|python_tag|>{"name": "f", "parameters": {"x": 1}}\n', [F]),
        ("bare", '{"name":"f","parameters":{"x":1}}\n{"name":"f","parameters":{"x":1}}', [F, F]),
        ("bare", '{"answer": 42} is it', [Content('{"answer": 42} is it')]),
        ("bare", '{"answer": 42', [Content('{"answer": 42')]),
        ("bare", '<|python_tag|>print("x")', [Content('<|python_tag|>print("x")')]),
        ("bare", f'See {{"name": "f"}} {CALL}', [Content(f'See {{"name": "f"}} {CALL}')]),
        ("thinks", "<think>\nso\n\n</think>\n\nYes.", [Reasoning("so"), Content("Yes.")]),
        ("thinks", "<think>a<think>b</thin></think>", [Reasoning("a<think>b</thin>")]),
        ("thinks", "No <think>a</think>", [Content("No <think>a</think>")]),
        ("thinks", " <think>never ends", [Reasoning("never ends")]),
        ("thinks", " <thin", [Content(" <thin")]),
        ("thinks", "<think></think>", []),
        ("inside", "so\n\nmore\n</think>\nYes </think>", [Reasoning("so\n\nmore"), Content("Yes </think>")]),
        ("inside", "so</think", [Reasoning("so</think")]),
        ("thinks and tags", f"<think>{CALL}</think>{CALL}", [Reasoning(CALL), F]),
        ("inside and tags", f"\nx\n</think>\n\nHm.\n{CALL}", [Reasoning("x"), Content("Hm."), F]),
        ("thinks and bare", '<think>x</think>\n{"name":"f","parameters":{"x":1}}', [Reasoning("x"), F]),
    ],
)
def test_a_text_comes_apart(setting: str, text: str, pieces: list[Piece]) -> None:
    assert parse(setting, text) == pieces
    assert parse(setting, *text) == pieces


@pytest.mark.parametrize(
    "bad",
    [
        "<tool_call>",
        "<tool_call>\n\n",
        "<tool_call>f(1)</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {"x": ',
        '<tool_call>{"name": "f", "arguments": {}} and </tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} </tool_x',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {},}</tool_call>',
        "<tool_call>{}</tool_call>",
        '<tool_call>{"a":' * 3000 + "}" * 3000 + "</tool_call>",
    ],
)
def test_a_call_that_cannot_be_read_is_content_as_it_stands(bad: str) -> None:
    text = f"Look: \n{bad}"
    assert parse("tags", text) == parse("tags", *text) == [Content(text)]


def test_a_good_call_is_found_after_a_bad_one() -> None:
    for bad in ("<tool_call>f(1)</tool_call>\n", '<tool_call>{"name": 1}</tool_call>', "<tool_call>"):
        assert parse("tags", bad + CALL) == [Content(bad.rstrip("\n")), F]


def test_a_call_is_given_when_it_closes_and_text_as_soon_as_it_is_certain() -> None:
    parser = MessageParser(tool_style=TAGS, thinks=True)
    steps = [
        "<thi",
        "nk>",
        "a",
        " ",
        "b</",
        "think",
        ">\nHi",
        " <too",
        "th <",
        "tool_call>",
        CALL[11:-1],
        ">",
        "x",
    ]
    given = [parser.push(step) for step in steps]
    assert given == [
        *([], [], [Reasoning("a")], [], [Reasoning(" b")], [], [Content("Hi")], []),
        [Content(" <tooth")],
        *([], [], [F], [Content("x")]),
    ]
    assert parser.flush() == []


FRAGMENTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "<",
            "</",
            "tool_call>",
            ">",
        ),
        *('{"name": "f", "arguments": {"x": 1}}', '{"name":"f","parameters":', "{", "}", '"', "\\", "{}"),
        *("\n", " ", "\t", "é", "hello", CALL),
    ]
)


@given(st.sampled_from(list(SETTINGS)), st.lists(FRAGMENTS, max_size=12).map("".join), st.data())
def test_the_pieces_are_the_same_however_the_text_is_cut(
    setting: str, text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pushes = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(setting, text)
    assert parse(setting, *pushes) == whole
    assert parse(setting, *text) == whole


@given(st.sampled_from(list(SETTINGS)), st.lists(FRAGMENTS, max_size=12).map("".join))
def test_no_character_is_lost_but_tags_and_blanks(setting: str, text: str) -> None:
    kept = "".join(
        f'{{"name": "{piece.name}", "arguments": {piece.arguments}}}'
        if isinstance(piece, ToolCall)
        else piece.text
        for piece in parse(setting, text)
    )
    assert essence(kept) == essence(text)


def essence(text: str) -> str:
    """A text without blanks and tags, those that come about by leaving out others included."""
    text, shorter = "", "".join(text.split()).replace('"parameters":', '"arguments":')
    while shorter != text:
        text, shorter = shorter, re.sub(r"</?(think|tool_call)>|<\|python_tag\|>", "", shorter)
    return text


@pytest.mark.parametrize("setting", ["tags", "bare", "inside and tags", "thinks and bare"])
@pytest.mark.parametrize(
    "unit", ["\n", "<", "<tool_call", "</think", '<tool_call>{"', "{", '{"a":"\\"', "word ", "<tool_call>{}"]
)
def test_the_time_is_linear(setting: str, unit: str) -> None:
    text = unit * (80 // len(unit))
    parser = MessageParser(**SETTINGS[setting])
    start = time.process_time()
    for _ in range(12_000):
        parser.push(text)
    parser.flush()
    # Measured: 0.3 s. Reading a megabyte again at each push would take ten times as long at least.
    assert time.process_time() - start < 2
