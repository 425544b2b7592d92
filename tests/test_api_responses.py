"""OpenAI's /v1/responses on a live server: golden events, the real SDK, and every field served or refused."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent import ARGUMENTS, SAID, THOUGHT, agent_llama
from live import LiveServer
from wire import Form, RawCall, metric, wait_for

from server.errors import RequestError
from server.routes.openai_fields import GUIDED, SamplingFields
from server.routes.responses_answers import ResponseEvent, ResponseObject
from server.routes.responses_fields import Item, ResponseRequest, plain_items

PATH = "/v1/responses"
TEXT = "A😎é漢. BCD"
"""What the script model says after a chat template, which ends with a line end; every byte is a token."""
PIECES = ["A", "😎", "é", "漢", ".", " ", "B", "C", "D"]
PROMPT_TOKENS = len("user\nhi\nassistant\n") + 3
TOOL = {
    "type": "function",
    "name": "f",
    "description": "does it",
    "parameters": {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "strict": True,
}
FORMAT = {"type": "json_schema", "name": "yes", "schema": {"const": "yes"}}


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
def sdk(script_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=script_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: LiveServer, **body: object) -> dict[str, Any]:
    """The answer, which is as /openapi.json describes it."""
    with server.client() as client:
        answer = client.post(PATH, json={"input": "hi"} | body)
    assert answer.status_code == 200, answer.text
    ResponseObject.model_validate_json(answer.content)
    return dict(answer.json())


def parse(text: str) -> list[dict[str, Any]]:
    """A stream's events, whose framing must be a line with the type, a line of data and a blank line."""
    events = text.split("\n\n")
    assert events.pop() == ""
    parsed = []
    for number, event in enumerate(events):
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
        assert parsed[-1]["sequence_number"] == number
        ResponseEvent.model_validate_json(data.removeprefix("data: "))
    return parsed


def stream(server: LiveServer, **body: object) -> list[dict[str, Any]]:
    with server.client() as client:
        answer = client.post(PATH, json={"input": "hi"} | body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    return parse(answer.text)


def brief(events: list[dict[str, Any]]) -> list[Any]:
    """Events without what differs from call to call, and without the response around them."""
    hidden = {"sequence_number", "response", "item_id", "logprobs"}
    return [
        {key: value for key, value in event.items() if key not in hidden}
        | ({"item": same(event["item"])} if "item" in event else {})
        for event in events
    ]


def same(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def message(status: str, *texts: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts]
    return {"type": "message", "role": "assistant", "status": status, "content": content}


def text_events(index: int, pieces: list[str], status: str = "completed") -> list[dict[str, Any]]:
    place = {"output_index": index, "content_index": 0}
    whole = "".join(pieces)

    def part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    return [
        {"type": "response.output_item.added", "output_index": index, "item": message("in_progress")},
        {"type": "response.content_part.added", **place, "part": part("")},
        *({"type": "response.output_text.delta", **place, "delta": piece} for piece in pieces),
        {"type": "response.output_text.done", **place, "text": whole},
        {"type": "response.content_part.done", **place, "part": part(whole)},
        {"type": "response.output_item.done", "output_index": index, "item": message(status, whole)},
    ]


STARTED: list[dict[str, Any]] = [{"type": "response.created"}, {"type": "response.in_progress"}]


def test_an_answer(script_server: LiveServer) -> None:
    answer = post(script_server, model=script_server.name, metadata={"a": "b"}, instructions="Be.")
    assert re.fullmatch("resp_[0-9a-f]{48}", answer["id"])
    assert (answer["object"], answer["status"], answer["model"]) == (
        "response",
        "completed",
        script_server.name,
    )
    (item,) = answer["output"]
    assert re.fullmatch("msg_[0-9a-f]{48}", item["id"])
    assert same(item) == message("completed", TEXT)
    assert answer["usage"] == {
        "input_tokens": PROMPT_TOKENS + len("system\nBe.\n") + 2,
        "input_tokens_details": answer["usage"]["input_tokens_details"],
        "output_tokens": len(TEXT.encode()) + 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT_TOKENS + len("system\nBe.\n") + 2 + len(TEXT.encode()) + 1,
    }
    assert answer["metadata"] == {"a": "b"}
    assert answer["instructions"] == "Be."
    assert answer["created_at"] <= answer["completed_at"]
    assert (answer["error"], answer["incomplete_details"], answer["store"]) == (None, None, False)


def test_a_stream(script_server: LiveServer) -> None:
    events = stream(script_server)
    assert brief(events) == [*STARTED, *text_events(0, PIECES), {"type": "response.completed"}]
    created, progress, *_, last = events
    assert created["response"] == progress["response"]
    assert created["response"]["output"] == []
    assert created["response"]["usage"] is None
    assert created["response"]["status"] == "in_progress"
    (item,) = last["response"]["output"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    whole = last["response"]
    moving = {"id", "created_at", "completed_at", "output", "usage"}
    for name, value in post(script_server).items():
        if name not in moving:
            assert whole[name] == value, name
    assert [same(item) for item in post(script_server)["output"]] == [same(item)]


def test_an_answer_that_is_cut(script_server: LiveServer) -> None:
    events = stream(script_server, max_output_tokens=5)
    *_, last = events
    assert brief(events) == [
        *STARTED,
        *text_events(0, PIECES[:2], "incomplete"),
        {"type": "response.incomplete"},
    ]
    for answer in (last["response"], post(script_server, max_output_tokens=5)):
        assert answer["status"] == "incomplete"
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        assert answer["max_output_tokens"] == 5
        assert answer["completed_at"] is None
        assert answer["usage"]["output_tokens"] == 5
        assert same(answer["output"][0]) == message("incomplete", "A😎")


def test_reasoning_text_and_a_call(agent_server: LiveServer) -> None:
    events = stream(agent_server, tools=[TOOL])
    place = {"output_index": 0, "content_index": 0}

    def thinking(status: str, *texts: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text} for text in texts]
        return {"type": "reasoning", "summary": [], "status": status, "content": content}

    def call(status: str, arguments: str) -> dict[str, Any]:
        return {"type": "function_call", "status": status, "name": "f", "arguments": arguments}

    part = {"type": "reasoning_text", "text": THOUGHT}
    assert brief(events) == [
        *STARTED,
        {"type": "response.output_item.added", "output_index": 0, "item": thinking("in_progress")},
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        *({"type": "response.reasoning_text.delta", **place, "delta": piece} for piece in THOUGHT),
        {"type": "response.reasoning_text.done", **place, "text": THOUGHT},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": thinking("completed", THOUGHT)},
        *text_events(1, list(SAID)),
        {"type": "response.output_item.added", "output_index": 2, "item": call("in_progress", "")},
        {"type": "response.function_call_arguments.delta", "output_index": 2, "delta": ARGUMENTS},
        {
            "type": "response.function_call_arguments.done",
            "output_index": 2,
            "name": "f",
            "arguments": ARGUMENTS,
        },
        {"type": "response.output_item.done", "output_index": 2, "item": call("completed", ARGUMENTS)},
        {"type": "response.completed"},
    ]
    answer = post(agent_server, tools=[TOOL])
    last = events[-1]["response"]
    assert [same(item) for item in answer["output"]] == [same(item) for item in last["output"]]
    assert [item["id"][:3] for item in answer["output"]] == ["rs_", "msg", "fc_"]
    assert answer["output"][2]["call_id"].startswith("call_")
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": len(THOUGHT)}
    assert (answer["tools"], answer["tool_choice"], answer["parallel_tool_calls"]) == ([TOOL], "auto", True)


def test_reasoning_can_be_switched_off(agent_server: LiveServer) -> None:
    answer = post(agent_server, tools=[TOOL], reasoning={"effort": "none"})
    assert [item["type"] for item in answer["output"]] == ["message", "function_call"]
    assert answer["reasoning"] == {"effort": "none", "summary": None}
    values = {"enable_thinking": False}
    assert [item["type"] for item in post(agent_server, chat_template_kwargs=values)["output"]] == ["message"]


def test_a_call_that_must_come(agent_server: LiveServer) -> None:
    """The model would say something first, and call another function."""
    other = {"type": "function", "name": "g", "parameters": {"additionalProperties": False}}
    call: dict[str, Any] = {"tools": [TOOL, other], "temperature": 0, "parallel_tool_calls": False}
    call["reasoning"] = {"effort": "none"}
    answer = post(agent_server, **call, tool_choice={"type": "function", "name": "g"})
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["arguments"]) == ("function_call", "g", "{}")
    assert answer["tool_choice"] == {"type": "function", "name": "g"}
    assert answer["parallel_tool_calls"] is False
    (item,) = post(agent_server, **call, tool_choice="required")["output"]
    assert item["type"] == "function_call"
    (item,) = post(agent_server, **call, tool_choice="none")["output"]
    assert item["type"] == "message"  # a call is text


def test_a_text_in_a_format(tiny_server: LiveServer) -> None:
    answer = post(tiny_server, text={"format": FORMAT})
    assert answer["output"][0]["content"][0]["text"] == '"yes"'
    assert answer["text"] == {"format": FORMAT}
    whole = post(tiny_server, text={"format": {"type": "json_object"}}, temperature=0, max_output_tokens=3)
    assert whole["output"][0]["content"][0]["text"].startswith("{")
    assert post(tiny_server, text={}, max_output_tokens=1)["text"] == {"format": {"type": "text"}}


def test_an_answer_without_text(script_server: LiveServer) -> None:
    """There is a message in any case."""
    events = stream(script_server, stop="A")
    assert brief(events) == [*STARTED, *text_events(0, []), {"type": "response.completed"}]


@pytest.mark.parametrize("streamed", [True, False])
def test_the_client_leaves(tiny_server: LiveServer, streamed: bool) -> None:
    tiny_server.wait_until_idle()
    before = metric(tiny_server, "requests_total", fate="aborted")
    with RawCall(
        tiny_server, Form(PATH, streamed), {"input": "hi", "stream": streamed, "ignore_eos": True}
    ) as call:
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

        steps = 0

        def fail(batch: Any) -> Any:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise RuntimeError("secret")
            return original(batch)

        runner.execute = fail
        for good_steps, pieces in ((0, []), (5, PIECES[:2])):
            steps = good_steps
            events = stream(server)
            *begun, error, failed = events
            items = text_events(0, pieces, "incomplete") if pieces else []
            assert brief(begun) == [*STARTED, *items]
            assert (error["type"], error["code"]) == ("error", "server_error")
            whole = failed["response"]
            assert (failed["type"], whole["status"]) == ("response.failed", "failed")
            assert whole["error"] == {"code": "server_error", "message": error["message"]}
            assert [same(item) for item in whole["output"]] == [event["item"] for event in items[-1:]]
            assert "secret" not in json.dumps(events)
        with server.client() as client:
            assert client.post(PATH, json={"input": "hi"}).status_code == 500
        runner.execute = original
        assert post(server)["status"] == "completed"
    finally:
        server.stop()


# The SDK


def test_sdk(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    answer = sdk.responses.create(model=script_server.name, input="hi", temperature=0)
    assert answer.output_text == TEXT
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    type(answer).model_validate_json(answer.model_dump_json())


def test_sdk_stream(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    events = list(sdk.responses.create(model=script_server.name, input="hi", stream=True))
    for event in events:
        type(event).model_validate_json(event.model_dump_json())  # the SDK itself checks nothing
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == TEXT
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == TEXT
    with sdk.responses.stream(model=script_server.name, input="hi", max_output_tokens=5) as helper:
        for _ in helper:
            pass
    with sdk.responses.stream(model=script_server.name, input="hi") as helper:
        assert helper.get_final_response().output_text == TEXT


def test_sdk_talks_on(agent_server: LiveServer) -> None:
    """What an answer held goes back as it came, with the result of its call."""
    url = agent_server.url + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
        items: list[Any] = [{"role": "user", "content": "hi"}]
        for _ in range(2):
            stream = sdk.responses.create(model="dummy", input=items, tools=[TOOL], stream=True)  # type: ignore[list-item]
            for event in stream:
                type(event).model_validate_json(event.model_dump_json())
            assert event.type == "response.completed"
            output = event.response.output
            assert [item.type for item in output] == ["reasoning", "message", "function_call"]
            call = output[2]
            assert call.type == "function_call"
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "ok"}
            items += [*(item.model_dump() for item in output), result]


def test_sdk_errors(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.responses.create(model="gpt-unknown", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.responses.create(model=script_server.name, input="hi", previous_response_id="resp_1", stream=True)
    assert bad.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.responses.create(model=script_server.name, input="x" * 600)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "input")


# From items to messages

CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "ok"}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
THINKING = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]}
ANSWER = {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "developer", "content": "d"}], [{"role": "system", "content": "d"}]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": text} for text in "ab"]}],
            [{"role": "user", "content": "ab"}],
        ),
        (
            [THINKING, ANSWER, CALL, CALL, OUTPUT],
            [
                {"role": "assistant", "content": "a", "reasoning_content": "t", "tool_calls": [CALLED] * 2},
                {"role": "tool", "content": "ok", "tool_call_id": "c"},
            ],
        ),
        (
            [CALL, ANSWER, ANSWER],
            [
                {"role": "assistant", "content": "", "tool_calls": [CALLED]},
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "content": "a"},
            ],
        ),
        (
            [THINKING, CALL, OUTPUT, THINKING, ANSWER],
            [
                {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALLED]},
                {"role": "tool", "content": "ok", "tool_call_id": "c"},
                {"role": "assistant", "content": "a", "reasoning_content": "t"},
            ],
        ),
    ],
    ids=["developer", "parts", "one answer", "text after a call", "two answers"],
)
def test_items_are_messages(items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert plain_items([Item.model_validate(item) for item in items]) == messages


# Fields

GREEDY = {"temperature": 0}
SAMPLED = {"seed": 1, "temperature": 1.5}
EFFECTS: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature": ({"seed": 1}, 2.0),
    "top_p": (SAMPLED, 0.1),
    "top_k": (SAMPLED, 2),
    "min_p": (SAMPLED, 0.9),
    "typical_p": (SAMPLED, 0.1),
    "repetition_penalty": (GREEDY, 5.0),
    "frequency_penalty": (GREEDY, 2.0),
    "presence_penalty": (GREEDY, 2.0),
    "logit_bias": (GREEDY, {"65": 100}),
    "seed": (SAMPLED, 2),
    "max_output_tokens": (GREEDY, 7),
    "structured_outputs": (GREEDY, {"regex": "[ab]{5}"}),
    "text": (GREEDY, {"format": FORMAT}),
    "instructions": (GREEDY, "Be brief."),
    "input": (GREEDY, "ho"),
    "stop_token_ids": (GREEDY | {"logit_bias": {"65": 100}}, [65]),
    "min_tokens": (GREEDY | {"ignore_eos": False, "logit_bias": {"257": 100}}, 5),
    "ignore_eos": (GREEDY | {"ignore_eos": False, "logit_bias": {"257": 100}}, True),
}
ELSEWHERE = {
    "model": "test_sdk_errors",
    "stream": "test_a_stream",
    "stream_options": "test_options_of_a_stream",
    "stop": "test_an_answer_without_text",
    "reasoning": "test_reasoning_can_be_switched_off",
    "chat_template_kwargs": "test_reasoning_can_be_switched_off",
    "tools": "test_a_call_that_must_come",
    "tool_choice": "test_a_call_that_must_come",
    "parallel_tool_calls": "test_a_call_that_must_come",
    "metadata": "test_an_answer",
    "user": "test_labels_come_back",
    "prompt_cache_key": "test_labels_come_back",
    "safety_identifier": "test_labels_come_back",
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_has_an_effect(exact_server: LiveServer, name: str) -> None:
    base, value = EFFECTS[name]
    call = {"input": "hi", "max_output_tokens": 40, "ignore_eos": True} | base

    def said(**more: Any) -> tuple[Any, ...]:
        answer = post(exact_server, **call | more)
        return answer["usage"]["output_tokens"], *(item["content"] for item in answer["output"])

    before = said()
    assert said() == before
    assert said(**{name: value}) != before


def test_every_field_is_shown_to_work_or_refused() -> None:
    guided = {f"guided_{part}" for part in GUIDED}
    shown = EFFECTS.keys() | ELSEWHERE.keys()
    assert ResponseRequest.model_fields.keys() == shown | ResponseRequest.NEUTRAL.keys() | guided
    assert not shown & (ResponseRequest.NEUTRAL.keys() | guided)
    assert {test for test in ELSEWHERE.values() if test not in globals()} == set()


def test_every_field_stands_in_the_documentation() -> None:
    api = (Path(__file__).resolve().parents[1] / "docs/api.md").read_text()
    section = api.partition("\n## OpenAI: `/v1/responses`")[2].partition("\n## ")[0]
    both = SamplingFields.NEUTRAL.keys() | {f"guided_{part}" for part in GUIDED}
    own = ResponseRequest.__annotations__.keys() - {"NEUTRAL"}
    assert set(re.findall("`([a-z_]+)`", section)) >= (ResponseRequest.model_fields.keys() - both) | own


@pytest.mark.parametrize("name", ResponseRequest.NEUTRAL)
def test_what_is_known_but_not_supported_is_refused(client: httpx.Client, name: str) -> None:
    call = {"input": "hi", "max_output_tokens": 1}
    for value in (*ResponseRequest.NEUTRAL[name], None):
        assert client.post(PATH, json=call | {name: value}).status_code == 200, value
    for value in (["x"], {"a": 1}, 7, "x", True):
        if value not in ResponseRequest.NEUTRAL[name]:
            error = refused(client, call | {name: value, "stream": True})
            assert error["param"] == name
            assert error["message"] == f"`{name}` is not supported"


def test_labels_come_back(script_server: LiveServer) -> None:
    labels = {"user": "u", "prompt_cache_key": "k", "safety_identifier": "s"}
    assert post(script_server, **labels).items() >= labels.items()


def test_options_of_a_stream(script_server: LiveServer, client: httpx.Client) -> None:
    options = {"include_obfuscation": False}
    assert brief(stream(script_server, stream_options=options)) == brief(stream(script_server))
    assert refused(client, {"input": "hi", "stream_options": options})["param"] == "stream_options"
    for name in ("include_obfuscation", "include_usage"):
        body = {"input": "hi", "stream": True, "stream_options": {name: True}}
        assert refused(client, body)["param"] == name


def refused(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(PATH, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = dict(answer.json()["error"])
    assert error["type"] == "invalid_request_error"
    assert "zq9" not in answer.text
    return error


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "hi"}, fields]}


def tools(**fields: Any) -> dict[str, Any]:
    return {"tools": [TOOL | fields]}


SURROGATE = "\ud800"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a"]}, "input.0"),
    ({"input": SURROGATE}, "input.0.content.0.text"),
    (item(role="tool", content="a"), "input.1.role"),
    (item(content="a"), "input.1.role"),
    (item(role="user"), "input.1.content"),
    (item(role="user", content=5), "input.1.content"),
    (item(role="user", content=[{"type": "input_image", "image_url": "zq9"}]), "input.1.content.0.type"),
    (item(role="user", content=[{"type": "input_text"}]), "input.1.content.0.text"),
    (item(type="item_reference", id="zq9"), "input.1.type"),
    (item(type="function_call", call_id="c", name="f"), "input.1.arguments"),
    (item(type="function_call", call_id="c", arguments="{}"), "input.1.name"),
    (item(type="function_call", name="f", arguments="{}"), "input.1.call_id"),
    (item(type="function_call_output", output="a"), "input.1.call_id"),
    (item(type="function_call_output", call_id="c"), "input.1.output"),
    (item(type="reasoning", encrypted_content="zq9"), "input.1.encrypted_content"),
    (item(type="reasoning", summary=[{"type": "summary_text", "text": "zq9"}]), "input.1.summary"),
    ({"instructions": 5}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    ({"text": {"format": FORMAT | {"schema": {"type": 5}}}}, "text.format"),
    ({"text": {"format": FORMAT}, "tools": [TOOL]}, "text.format"),
    ({"text": {"format": FORMAT}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    (tools(name="a b"), "tools"),
    (tools(parameters={"type": "array"}), "tools"),
    (tools(parameters=[]), "tools.0.parameters"),
    (tools(parameters={"a": float("nan")}) | {"tool_choice": "none"}, "tools.0.parameters"),
    (tools(parameters={"a": SURROGATE}) | {"tool_choice": "none"}, "tools.0.parameters"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    (tools() | {"tool_choice": {"type": "function", "name": "h"}}, "tool_choice"),
    (tools() | {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    (tools() | {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"metadata": {"a": 5}}, "metadata"),
    ({"metadata": {"zq9" * 30: "a"}}, "metadata"),
    ({"metadata": {"a": "zq9" * 200}}, "metadata"),
    ({"metadata": {SURROGATE: "a"}}, "metadata"),
    ({"metadata": {str(number): "a" for number in range(17)}}, "metadata"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"stop": ["a"] * 5}, "stop"),
]


@pytest.mark.parametrize(("fields", "name"), BAD, ids=[f"{b[1]} {i}" for i, b in enumerate(BAD)])
def test_a_bad_field_is_named(client: httpx.Client, fields: dict[str, Any], name: str) -> None:
    for streamed in ({}, {"stream": True}):
        error = refused(client, {"input": "hi"} | streamed | fields)
        assert error["param"] == name
    assert client.post(PATH, json={"input": "hi", "max_output_tokens": 1}).status_code == 200


def test_an_item_that_lacks_a_field_says_which() -> None:
    with pytest.raises(RequestError, match=re.escape("`input.0.role`: Field required")):
        plain_items([Item.model_validate({"content": "a"})])
