"""Anthropic's /v1/messages on a live server: golden events, the real SDK, every field served or refused."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from agent import ARGUMENTS, SAID, THOUGHT, agent_llama
from live import LiveServer
from wire import Background, Form, RawCall, metric, wait_for, without_id

from server.routes.anthropic_answers import AnthropicError, MessageAnswer, MessageEvent
from server.routes.anthropic_fields import CountRequest, MessagesRequest, TurnField, plain_messages
from server.routes.openai_fields import GUIDED, SamplingFields

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TEXT = "A😎é漢. BCD"
"""What the script model says after a chat template, which ends with a line end; every byte is a token."""
PIECES = ["A", "😎", "é", "漢", ".", " ", "B", "C", "D"]
PROMPT_TOKENS = len("user\nhi\nassistant\n") + 3
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "f", "description": "does it", "input_schema": SCHEMA}
THINK = {"type": "enabled", "budget_tokens": 10}


@pytest.fixture(scope="module")
def agent_server(
    serve: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    folder: Path = tmp_path_factory.mktemp("agent")
    agent_llama(folder)
    return serve(folder, dtype="float32")


@pytest.fixture(scope="module")
def client(tiny_server: LiveServer) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client
        tiny_server.wait_until_idle()


@pytest.fixture
def sdk(script_server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=script_server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 50} | fields


def post(server: LiveServer, **fields: Any) -> dict[str, Any]:
    """The answer, which is as /openapi.json describes it."""
    with server.client() as client:
        answer = client.post(PATH, json=ask(**fields), headers={"x-api-key": "k", "anthropic-version": "1"})
    assert answer.status_code == 200, answer.text
    MessageAnswer.model_validate_json(answer.content)
    return dict(answer.json())


def stream(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events, whose framing must be a line with the type, a line of data and a blank line."""
    with server.client() as client:
        answer = client.post(PATH, json=ask(**fields, stream=True))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    parsed = []
    for event in events:
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
        MessageEvent.model_validate_json(data.removeprefix("data: "))
    return [without_id(event, answer) if event["type"] == "error" else event for event in parsed]


def count(server: LiveServer, **fields: Any) -> int:
    with server.client() as client:
        answer = client.post(COUNT, json={"messages": HELLO} | fields)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["input_tokens"]
    return int(answer.json()["input_tokens"])


def block_events(index: int, begin: dict[str, Any], deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": begin},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text_events(index: int, pieces: list[str]) -> list[dict[str, Any]]:
    deltas = [{"type": "text_delta", "text": piece} for piece in pieces]
    return block_events(index, {"type": "text", "text": ""}, deltas)


def same(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "id"}


def test_an_answer(script_server: LiveServer) -> None:
    answer = post(script_server, model=script_server.name, metadata={"user_id": "u"})
    assert re.fullmatch("msg_[0-9a-f]{24}", answer["id"])
    usage = answer.pop("usage")
    assert {key: value for key, value in answer.items() if key != "id"} == {
        "type": "message",
        "role": "assistant",
        "model": script_server.name,
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == PROMPT_TOKENS
    assert (usage["cache_creation_input_tokens"], usage["output_tokens"]) == (0, len(TEXT.encode()) + 1)


def test_a_stream(script_server: LiveServer) -> None:
    start, ping, *blocks, delta, stop = stream(script_server)
    message = start.pop("message")
    assert start == {"type": "message_start"}
    assert ping == {"type": "ping"}
    assert blocks == text_events(0, PIECES)
    usage = delta.pop("usage")
    assert delta == {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}}
    assert stop == {"type": "message_stop"}
    assert message == {
        "id": message["id"],
        "type": "message",
        "role": "assistant",
        "model": script_server.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage | {"output_tokens": message["usage"]["output_tokens"]},
    }
    assert message["usage"]["output_tokens"] == 1
    assert post(script_server)["usage"] == usage


@pytest.mark.parametrize(
    ("fields", "pieces", "delta"),
    [
        ({"max_tokens": 5}, PIECES[:2], ("max_tokens", None)),
        ({"stop_sequences": ["x", "BC"]}, PIECES[:6], ("stop_sequence", "BC")),
        ({"stop_sequences": ["A"]}, [], ("stop_sequence", "A")),
        ({"stop_token_ids": [ord("B")]}, PIECES[:6], ("end_turn", None)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_why_an_answer_ends(
    script_server: LiveServer, fields: dict[str, Any], pieces: list[str], delta: tuple[str, str | None]
) -> None:
    _, _, *blocks, last, _ = stream(script_server, **fields)
    assert blocks == (text_events(0, pieces) if pieces else [])
    assert (last["delta"]["stop_reason"], last["delta"]["stop_sequence"]) == delta
    answer = post(script_server, **fields)
    assert answer["content"] == ([{"type": "text", "text": "".join(pieces)}] if pieces else [])
    assert (answer["stop_reason"], answer["stop_sequence"]) == delta


def test_thinking_text_and_a_call(agent_server: LiveServer) -> None:
    _, _, *blocks, last, _ = stream(agent_server, tools=[TOOL], thinking=THINK)
    call = blocks[-3]["content_block"]
    assert re.fullmatch("toolu_[0-9a-f]{24}", call["id"])
    assert blocks == [
        *block_events(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            [{"type": "thinking_delta", "thinking": piece} for piece in THOUGHT],
        ),
        *text_events(1, list(SAID)),
        *block_events(
            2,
            {"type": "tool_use", "id": call["id"], "name": "f", "input": {}},
            [{"type": "input_json_delta", "partial_json": ARGUMENTS}],
        ),
    ]
    assert last["delta"]["stop_reason"] == "tool_use"
    answer = post(agent_server, tools=[TOOL])
    assert [same(block) for block in answer["content"]] == [
        {"type": "thinking", "thinking": THOUGHT, "signature": ""},
        {"type": "text", "text": SAID},
        {"type": "tool_use", "name": "f", "input": {"a": 1}},
    ]
    assert answer["stop_reason"] == "tool_use"


def test_thinking_can_be_switched_off(agent_server: LiveServer) -> None:
    for fields in ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}):
        answer = post(agent_server, tools=[TOOL], **fields)
        assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]


def test_a_call_that_must_come(agent_server: LiveServer) -> None:
    """The model would say something first, and call another function."""
    other = {"name": "g", "input_schema": {"additionalProperties": False}}
    off = {"type": "disabled"}
    fields: dict[str, Any] = {"tools": [TOOL, other], "max_tokens": 99, "temperature": 0, "thinking": off}
    choice = {"type": "tool", "name": "g", "disable_parallel_tool_use": True}
    answer = post(agent_server, **fields, tool_choice=choice)
    assert [same(block) for block in answer["content"]] == [{"type": "tool_use", "name": "g", "input": {}}]
    assert answer["stop_reason"] == "tool_use"
    one = {"type": "any", "disable_parallel_tool_use": True}
    assert [
        block["type"]
        for block in post(agent_server, **fields | {"tools": [other]}, tool_choice=one)["content"]
    ] == ["tool_use"]
    answer = post(agent_server, **fields, tool_choice={"type": "none"})
    assert [block["type"] for block in answer["content"]] == ["text"]  # a call is text


def test_what_a_prompt_costs(script_server: LiveServer, agent_server: LiveServer) -> None:
    assert count(script_server) == PROMPT_TOKENS
    assert (
        count(script_server, model=script_server.name, system="Be.")
        == PROMPT_TOKENS + len("system\nBe.\n") + 2
    )
    assert count(agent_server, tools=[TOOL]) > count(agent_server) + 50
    assert count(agent_server, tools=[TOOL], tool_choice={"type": "none"}) == count(agent_server)
    off = count(agent_server, thinking={"type": "disabled"})
    assert off == count(agent_server) - len("<think>\n") + len("<tool_call>")
    usage = post(agent_server, tools=[TOOL])["usage"]
    told = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert told == count(agent_server, tools=[TOOL])


@pytest.mark.parametrize("streamed", [True, False])
def test_the_client_leaves(tiny_server: LiveServer, streamed: bool) -> None:
    tiny_server.wait_until_idle()
    before = metric(tiny_server, "requests_total", fate="aborted")
    body = ask(stream=streamed, ignore_eos=True, max_tokens=450)
    with RawCall(tiny_server, Form(PATH, streamed), body) as call:
        wait_for(lambda: tiny_server.stats.running == 1)
        if streamed:
            call.read_events(6)
        call.leave()
        tiny_server.wait_until_idle(1)
    assert metric(tiny_server, "requests_total", fate="aborted") == before + 1


def test_a_model_that_fails(script_folder: Path) -> None:
    server = LiveServer(script_folder, dtype="float32")
    try:
        runner = server.service.engine._runner
        original = runner.execute

        steps = 5

        def fail(batch: Any) -> Any:
            nonlocal steps
            steps -= 1
            if (
                steps < 0 and batch.chunks[0].request_id != "probe"
            ):  # the requests are at fault, not the model
                raise RuntimeError("secret")
            return original(batch)

        runner.execute = fail
        start, _, *blocks, error = stream(server)
        assert start["type"] == "message_start"
        assert blocks == text_events(0, PIECES[:2])[:-1]
        assert (error["type"], error["error"]["type"]) == ("error", "api_error")
        assert "secret" not in json.dumps(error)
        assert stream(server) == [error]
        with server.client() as client:
            answer = client.post(PATH, json=ask())
        assert answer.status_code == 500
        assert without_id(answer.json(), answer) == error
        with (
            anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as sdk,
            pytest.raises(anthropic.APIError, match="api_error"),
        ):
            list(sdk.messages.create(model="dummy", messages=HELLO, max_tokens=5, stream=True))
        runner.execute = original
        assert post(server)["stop_reason"] == "end_turn"
    finally:
        server.stop()


def test_a_full_queue(serve: Callable[..., LiveServer], tiny_folder: Path) -> None:
    server = serve(tiny_folder, dtype="float32", max_running=1, max_waiting=1)
    long = ask(max_tokens=450, ignore_eos=True)
    calls = []
    for running, waiting in ((1, 0), (1, 1)):
        calls.append(Background(server, Form(PATH, False), long))
        wait_for(lambda now=(running, waiting): (server.stats.running, server.stats.waiting) == now)
    with server.client() as client:
        answer = client.post(PATH, json=ask(stream=True))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert [call.answer().status_code for call in calls] == [200, 200]


# The SDK


def test_sdk(sdk: anthropic.Anthropic, script_server: LiveServer) -> None:
    answer = sdk.messages.create(
        model=script_server.name, max_tokens=50, messages=HELLO, extra_body={"temperature": 0}
    )
    (block,) = answer.content
    assert block.type == "text"
    assert (block.text, answer.stop_reason) == (TEXT, "end_turn")
    type(answer).model_validate_json(answer.model_dump_json())
    tokens = sdk.messages.count_tokens(model=script_server.name, messages=HELLO)
    assert tokens.input_tokens == PROMPT_TOKENS


def test_sdk_stream(sdk: anthropic.Anthropic, script_server: LiveServer) -> None:
    events = sdk.messages.create(model=script_server.name, max_tokens=50, messages=HELLO, stream=True)
    kinds = []
    for event in events:
        type(event).model_validate_json(event.model_dump_json())  # the SDK itself checks nothing
        kinds.append(event.type)
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    with sdk.messages.stream(model=script_server.name, max_tokens=50, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == TEXT
        assert stream.get_final_message().usage.output_tokens == len(TEXT.encode()) + 1


def test_sdk_talks_on(agent_server: LiveServer) -> None:
    """What an answer held goes back as it came, with the result of its call."""
    with anthropic.Anthropic(base_url=agent_server.url, api_key="none", max_retries=0) as sdk:
        messages = list(HELLO)
        for _ in range(2):
            with sdk.messages.stream(
                model="dummy", max_tokens=50, messages=messages, tools=[TOOL], system="Be."
            ) as stream:
                answer = stream.get_final_message()
            thinking, text, call = answer.content
            assert thinking.type == "thinking"
            assert text.type == "text"
            assert call.type == "tool_use"
            assert (thinking.thinking, text.text, call.input) == (THOUGHT, SAID, {"a": 1})
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "ok"}
            messages += [
                {"role": "assistant", "content": answer.content},
                {"role": "user", "content": [result]},
            ]


def test_sdk_errors(sdk: anthropic.Anthropic, script_server: LiveServer) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        sdk.messages.create(model="claude-unknown", max_tokens=5, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="`max_tokens`"):
        sdk.messages.create(model=script_server.name, max_tokens=0, messages=HELLO, stream=True)
    long: Any = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(anthropic.BadRequestError, match="`messages`: This model's maximum context length"):
        sdk.messages.create(model=script_server.name, max_tokens=5, messages=long)


# From blocks to messages

USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"ä": 1}}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"ä": 1}'}}
RESULT = {
    "type": "tool_result",
    "tool_use_id": "c",
    "content": [{"type": "text", "text": text} for text in "ab"],
}
THINKING = {"type": "thinking", "thinking": "t", "signature": "s"}
SAY = {"type": "text", "text": "x", "citations": None, "cache_control": {"type": "ephemeral"}}
RESULTED = {"role": "tool", "content": "a\nb", "tool_call_id": "c"}


@pytest.mark.parametrize(
    ("role", "blocks", "messages"),
    [
        ("user", "hi", [{"role": "user", "content": "hi"}]),
        ("user", [SAY, SAY], [{"role": "user", "content": "x\nx"}]),
        ("user", [RESULT, SAY], [RESULTED, {"role": "user", "content": "x"}]),
        ("user", [SAY, RESULT], [{"role": "user", "content": "x"}, RESULTED]),
        ("user", [RESULT | {"is_error": True}], [RESULTED | {"content": "Error: a\nb"}]),
        ("user", [{"type": "tool_result", "tool_use_id": "c"}], [RESULTED | {"content": ""}]),
        ("assistant", "hi", [{"role": "assistant", "content": "hi"}]),
        (
            "assistant",
            [THINKING, SAY, USE, USE],
            [{"role": "assistant", "content": "x", "reasoning_content": "t", "tool_calls": [CALLED] * 2}],
        ),
    ],
    ids=str,
)
def test_blocks_are_messages(role: str, blocks: Any, messages: list[dict[str, Any]]) -> None:
    asked = [{"role": role, "content": blocks}, {"role": "user", "content": "?"}]
    assert plain_messages([TurnField.model_validate(message) for message in asked]) == [
        *messages,
        {"role": "user", "content": "?"},
    ]


# Fields

GREEDY = {"temperature": 0}
SAMPLED = {"seed": 1, "temperature": 1}
FLAT = SAMPLED | {"logit_bias": {str(token): 30 for token in range(97, 123)}}
ENDING = GREEDY | {"ignore_eos": False, "logit_bias": {"257": 100}}
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({"seed": 1}, 0),
    "top_p": (FLAT, 0.1),
    "top_k": (FLAT, 2),
    "min_p": (FLAT, 0.9),
    "typical_p": (FLAT, 0.1),
    "repetition_penalty": (GREEDY, 5.0),
    "frequency_penalty": (GREEDY, 2.0),
    "presence_penalty": (GREEDY, 2.0),
    "logit_bias": (GREEDY, {"65": 100}),
    "seed": (FLAT, 2),
    "max_tokens": (GREEDY, 7),
    "structured_outputs": (GREEDY, {"regex": "[ab]{5}"}),
    "system": (GREEDY, [{"type": "text", "text": "Be brief."}]),
    "messages": (GREEDY, [{"role": "user", "content": "ho"}]),
    "stop_token_ids": (GREEDY | {"logit_bias": {"65": 100}}, [65]),
    "min_tokens": (ENDING, 5),
    "ignore_eos": (ENDING, True),
}
ELSEWHERE = {
    "model": "test_sdk_errors",
    "stream": "test_a_stream",
    "stop_sequences": "test_why_an_answer_ends",
    "thinking": "test_thinking_can_be_switched_off",
    "chat_template_kwargs": "test_thinking_can_be_switched_off",
    "tools": "test_a_call_that_must_come",
    "tool_choice": "test_a_call_that_must_come",
    "cache_control": "test_a_prompt_is_kept_in_any_case",
    "metadata": "test_an_answer",
    "user": "test_an_answer",
}
REFUSED = [
    *((PATH, name, values) for name, values in MessagesRequest.NEUTRAL.items()),
    *((COUNT, name, values) for name, values in CountRequest.NEUTRAL.items()),
]


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_has_an_effect(exact_server: LiveServer, name: str) -> None:
    base, value = EFFECTS[name]
    call = {"max_tokens": 40, "ignore_eos": True} | base

    def said(**more: Any) -> tuple[Any, ...]:
        answer = post(exact_server, **call | more)
        return answer["usage"]["output_tokens"], answer["content"]

    before = said()
    assert said() == before
    assert said(**{name: value}) != before


def test_every_field_is_shown_to_work_or_refused() -> None:
    guided = {f"guided_{part}" for part in GUIDED}
    shown = EFFECTS.keys() | ELSEWHERE.keys()
    assert MessagesRequest.model_fields.keys() == shown | MessagesRequest.NEUTRAL.keys() | guided
    assert not shown & (MessagesRequest.NEUTRAL.keys() | guided)
    assert CountRequest.model_fields.keys() <= shown | CountRequest.NEUTRAL.keys()
    assert {test for test in ELSEWHERE.values() if test not in globals()} == set()


def test_every_field_stands_in_the_documentation() -> None:
    api = (Path(__file__).resolve().parents[1] / "docs/api.md").read_text()
    section = api.partition("\n## Anthropic: `/v1/messages`")[2].partition("\n## ")[0]
    both = SamplingFields.NEUTRAL.keys() | {f"guided_{part}" for part in GUIDED}
    own = MessagesRequest.__annotations__.keys() - {"NEUTRAL"}
    assert set(re.findall("`([a-z_]+)`", section)) >= (MessagesRequest.model_fields.keys() - both) | own


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED, ids=lambda value: str(value))
def test_what_is_known_but_not_supported_is_refused(
    client: httpx.Client, path: str, name: str, neutral: tuple[Any, ...]
) -> None:
    call = {"messages": HELLO} | ({"max_tokens": 1} if path == PATH else {})
    for value in (*neutral, None):
        assert client.post(path, json=call | {name: value}).status_code == 200, value
    for value in (["x"], {"a": 1}, 7, "x", True):
        if value not in neutral:
            assert refused(client, path, call | {name: value}) == f"`{name}` is not supported"


def test_a_prompt_is_kept_in_any_case(tiny_server: LiveServer) -> None:
    """What `cache_control` asks for: the second call finds what the first one computed."""
    kept = {"type": "ephemeral"}
    messages = [{"role": "user", "content": [{"type": "text", "text": "long " * 20, "cache_control": kept}]}]
    post(tiny_server, messages=messages, max_tokens=1, cache_control=kept)
    usage = post(tiny_server, messages=messages, max_tokens=1)["usage"]
    assert usage["cache_read_input_tokens"] >= 96
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count(tiny_server, messages=messages)


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    AnthropicError.model_validate_json(answer.content)
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "zq9" not in answer.text
    return str(error["message"])


def says(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, *HELLO]}


SURROGATE = "\ud800"
PLACE = "messages.0.content.0"
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": SURROGATE}]}, f"{PLACE}.text"),
    (says("user", {"type": "image", "source": {"data": "zq9"}}), f"{PLACE}.type"),
    (says("user", {"type": "text"}), f"{PLACE}.text"),
    (says("user", {"type": "text", "text": "a", "citations": ["zq9"]}), f"{PLACE}.citations"),
    (says("user", SAY | {"cache_control": {"type": "zq9"}}), f"{PLACE}.cache_control.type"),
    (says("user", SAY | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}), f"{PLACE}.cache_control.ttl"),
    (says("user", USE), f"{PLACE}.type"),
    (says("user", THINKING), f"{PLACE}.type"),
    (says("user", {"type": "tool_result", "content": "a"}), f"{PLACE}.tool_use_id"),
    (says("user", RESULT | {"content": [{"type": "image"}]}), f"{PLACE}.content.0.type"),
    (says("assistant", RESULT), f"{PLACE}.type"),
    (says("assistant", {"type": "tool_use", "id": "c", "name": "f"}), f"{PLACE}.input"),
    (says("assistant", {"type": "tool_use", "id": "c", "input": {}}), f"{PLACE}.name"),
    (says("assistant", {"type": "tool_use", "name": "f", "input": {}}), f"{PLACE}.id"),
    (says("assistant", USE | {"input": {"a": SURROGATE}}), f"{PLACE}.input"),
    (says("assistant", USE | {"input": {"a": float("nan")}}), f"{PLACE}.input"),
    (says("assistant", {"type": "thinking", "signature": ""}), f"{PLACE}.thinking"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system.0.type"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools.0.input_examples"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "must"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice"),
    ({"thinking": {"type": "adaptive"}}, "thinking.type"),
    ({"thinking": THINK}, "thinking"),
    ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "disabled", "display": "omitted"}}, "thinking.display"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]
OWN: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"temperature": 1.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"seed": -1}, "seed"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"thinking": THINK | {"budget_tokens": 50}}, "thinking.budget_tokens"),
    ({"structured_outputs": {"regex": "a"}, "tools": [TOOL]}, "structured_outputs"),
    ({"guided_regex": "a"}, "guided_regex"),
]
BAD = [*((PATH, *bad) for bad in SHARED + OWN), *((COUNT, *bad) for bad in SHARED)]


@pytest.mark.parametrize(
    ("path", "fields", "name"), BAD, ids=[f"{b[0]} {b[2]} {i}" for i, b in enumerate(BAD)]
)
def test_a_bad_field_is_named(client: httpx.Client, path: str, fields: dict[str, Any], name: str) -> None:
    body = ask() if path == PATH else {"messages": HELLO}
    assert f"`{name}`" in refused(client, path, body | fields)
    assert client.post(path, json=body | {"max_tokens": 1}).status_code == 200


def test_other_errors_are_in_the_dialect_too(client: httpx.Client) -> None:
    for answer, status, kind in (
        (client.get(PATH), 405, "invalid_request_error"),
        (client.post(PATH + "/nothing", json={}), 404, "not_found_error"),
        (
            client.post(PATH, content=b"{", headers={"Content-Type": "application/json"}),
            400,
            "invalid_request_error",
        ),
        (client.post(PATH, content=b" " * 3_000_000), 413, "request_too_large"),
    ):
        assert answer.status_code == status
        AnthropicError.model_validate_json(answer.content)
        assert answer.json()["error"]["type"] == kind
    assert list(client.post("/v1/messages2", json={}).json()) == ["error"], "that path is OpenAI's"
