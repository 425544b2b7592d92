"""Every field of OpenAI's dialect on a live server: it has its effect, or it is refused by its name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import EOS, VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from test_api_openai import CHAT, COMPLETIONS, MESSAGES, TEXT, ask, post, stream
from wire import close

from server.routes.chat import ChatRequest
from server.routes.completions import CompletionRequest
from server.routes.openai_fields import GUIDED

BODIES = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

SAMPLED = {"seed": 1, "temperature": 1.5}
GREEDY = {"temperature": 0}
ENDING = GREEDY | {"ignore_eos": False, "logit_bias": {str(EOS): 100}}
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
    "n": (SAMPLED, 2),
    "max_tokens": (GREEDY, 7),
    "min_tokens": (ENDING, 5),
    "stop_token_ids": (GREEDY | {"logit_bias": {"65": 100}}, [65]),
    "response_format": (GREEDY, {"type": "json_object"}),
    "structured_outputs": (GREEDY, {"regex": "[ab]{5}"}),
}
ONLY: dict[str, dict[str, tuple[dict[str, Any], Any]]] = {
    CHAT: {
        "max_completion_tokens": (GREEDY, 7),
        "logprobs": (GREEDY, True),
        "top_logprobs": (GREEDY | {"logprobs": True}, 2),
    },
    COMPLETIONS: {"echo": (GREEDY, True), "logprobs": (GREEDY, 1), "best_of": (SAMPLED | {"seed": 3}, 4)},
}
ELSEWHERE = {
    "model": "test_an_unknown_model_is_not_found",
    "messages": "test_content_parts_are_one_text",
    "prompt": "test_a_prompt_in_its_four_forms",
    "stop": "test_the_stop_string_is_cut_off",
    "stream": "test_a_chat_stream",
    "stream_options": "test_usage_comes_once_at_the_end_if_asked_for",
    "ignore_eos": "test_special_tokens_have_no_text",
    "tools": "test_a_call_that_is_required_follows_its_schema",
    "tool_choice": "test_a_call_that_is_required_follows_its_schema",
    "parallel_tool_calls": "test_one_call_at_a_time",
    "chat_template_kwargs": "test_template_values_reach_the_template",
    "user": "a label, of which nothing is promised",
}
"""Field -> the test that shows its effect, in test_api_openai.py or test_chat_tools.py."""


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, own in ONLY.items() for name in EFFECTS | own]
)
def test_a_field_has_an_effect(tiny_server: LiveServer, path: str, name: str) -> None:
    base, value = (EFFECTS | ONLY[path])[name]
    call = ask(path) | {"max_tokens": 48, "ignore_eos": True} | base
    post(tiny_server, path, **call)  # torch rounds a prompt otherwise that is not in the prefix cache yet
    before = post(tiny_server, path, **call)["choices"]
    assert post(tiny_server, path, **call)["choices"] == before
    assert post(tiny_server, path, **call | {name: value})["choices"] != before


@pytest.mark.parametrize("path", BODIES)
def test_every_field_is_shown_to_work_or_refused(path: str) -> None:
    body = BODIES[path]
    guided = {f"guided_{part}" for part in GUIDED}
    shown = EFFECTS.keys() | ONLY[path].keys() | ELSEWHERE.keys() & body.model_fields.keys()
    assert body.model_fields.keys() == shown | body.NEUTRAL.keys() | guided
    assert not shown & (body.NEUTRAL.keys() | guided)


REFUSED = [
    *((path, name, values) for path, body in BODIES.items() for name, values in body.NEUTRAL.items()),
    *((path, f"guided_{part}", ()) for path in BODIES for part in GUIDED),
]


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED, ids=[f"{r[0]} {r[1]}" for r in REFUSED])
def test_what_is_known_but_not_supported_is_refused(
    tiny_server: LiveServer, path: str, name: str, neutral: tuple[Any, ...]
) -> None:
    call = ask(path) | {"max_tokens": 1}
    with tiny_server.client() as client:
        for value in (*neutral, None):
            assert client.post(path, json=call | {name: value}).status_code == 200, value
        for value in (["x"], {"a": 1}, 7, "x"):
            answer = client.post(path, json=call | {name: value, "stream": True})
            assert answer.status_code == 400, value
            error = answer.json()["error"]
            assert error["param"] == name
            assert error["message"].startswith(f"`{name}` is not supported")


def texts(answer: dict[str, Any]) -> list[str]:
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]


@pytest.mark.parametrize("path", BODIES)
def test_a_stop_token_ends_the_text(script_server: LiveServer, path: str) -> None:
    call = ask(path) | {"max_tokens": 50, "stop_token_ids": [ord("C"), ord("D"), ord("C")]}
    answer = post(script_server, path, **call)
    (choice,) = answer["choices"]
    before = TEXT.partition("C")[0]
    assert texts(answer) == [before if path == CHAT else "\n" + before]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("C"))
    *_, last = (part["choices"][0] for part in stream(script_server, path, **call))
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", ord("C"))


@pytest.mark.parametrize("path", BODIES)
def test_min_tokens_holds_the_end_off(script_server: LiveServer, path: str) -> None:
    whole = len(TEXT.encode()) + (2 if path == COMPLETIONS else 1)
    for more, text in (({}, TEXT), ({"stop_token_ids": [ord("C")]}, TEXT.partition("C")[0])):
        call = ask(path) | {"max_tokens": 60, "min_tokens": whole + 5, "temperature": 0} | more
        answer = post(script_server, path, **call)
        assert answer["usage"]["completion_tokens"] >= whole + 5
        assert text in texts(answer)[0]


def test_a_bias_of_100_decides(tiny_server: LiveServer) -> None:
    call = {"prompt": "a", "max_tokens": 8, "temperature": 0}
    assert texts(post(tiny_server, COMPLETIONS, **call, logit_bias={"90": 100})) == ["Z" * 8]
    ids = {str(token): -100 for token in range(VOCAB_SIZE) if token != 90}
    assert texts(post(tiny_server, COMPLETIONS, **call, logit_bias=ids)) == ["Z" * 8]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_best_candidates_are_given(exact_server: LiveServer, n: int) -> None:
    """By mean log-probability, whether or not that is told."""
    call = {"prompt": ["one", "two"], "max_tokens": 12, "seed": 5}
    every = post(exact_server, COMPLETIONS, **call, n=5, logprobs=0)["choices"]
    for logprobs in (None, 0):
        answer = post(exact_server, COMPLETIONS, **call, n=n, best_of=5, logprobs=logprobs)
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * n))
        assert answer["usage"]["prompt_tokens"] == 6
        assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)
        for prompt in (0, 1):
            candidates = every[5 * prompt : 5 * prompt + 5]
            if n < 5:
                candidates = sorted(candidates, key=mean_logprob, reverse=True)[:n]
            given = answer["choices"][n * prompt : n * prompt + n]
            assert [choice["text"] for choice in given] == [choice["text"] for choice in candidates]
            assert all((choice["logprobs"] is None) == (logprobs is None) for choice in given)


def mean_logprob(choice: dict[str, Any]) -> float:
    values = choice["logprobs"]["token_logprobs"]
    return float(sum(values) / len(values))


def test_candidates_do_not_go_with_a_stream(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        for more in ({"best_of": 2, "stream": True}, {"best_of": 2, "n": 3}, {"best_of": 17}):
            answer = client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1} | more)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "best_of"
    parts = stream(tiny_server, COMPLETIONS, prompt="a", max_tokens=2, best_of=2, n=2)
    assert {part["choices"][0]["index"] for part in parts} == {0, 1}


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 22, 333]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"ok", "size"} and isinstance(value["ok"], bool) and value["size"] in (1, 22, 333)


STRUCTURES: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        fits_schema,
    ),
    "json": ({"structured_outputs": {"json": SCHEMA}}, fits_schema),
    "json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, fits_schema),
    "regex": ({"structured_outputs": {"regex": "[a-c]{3}-\\d+x"}}, re.compile("[a-c]{3}-\\d+x").fullmatch),
    "choice": ({"structured_outputs": {"choice": ["yes", "no", "é😎"]}}, {"yes", "no", "é😎"}.__contains__),
    "grammar": (
        {"structured_outputs": {"grammar": 'start: "(" start ")" | "x"'}},
        re.compile("\\(*x\\)*").fullmatch,
    ),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_an_answer_matches_what_was_asked(exact_server: LiveServer, path: str, kind: str) -> None:
    """Whatever a random model would rather say; an answer that has no room for its end is cut."""
    asked, fits = STRUCTURES[kind]
    ended = 0
    for seed in range(3):
        call = ask(path) | asked | {"max_tokens": 120, "seed": seed, "n": 2, "logprobs": 1}
        if path == CHAT:
            call["logprobs"] = True
        answer = post(exact_server, path, **call)
        for choice, text in zip(answer["choices"], texts(answer), strict=True):
            ended += choice["finish_reason"] == "stop"
            assert choice["finish_reason"] == "length" or fits(text), text
        parts = [choice for part in stream(exact_server, path, **call) for choice in part["choices"]]
        for choice, text in zip(answer["choices"], texts(answer), strict=True):
            mine = [part for part in parts if part["index"] == choice["index"]]
            said = "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in mine)
            assert said == text
            assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert ended


def test_a_json_object_is_one_as_far_as_it_comes(tiny_server: LiveServer) -> None:
    form = {"type": "json_object"}
    for seed in range(3):
        answer = post(tiny_server, CHAT, messages=MESSAGES, response_format=form, max_tokens=60, seed=seed)
        (text,) = texts(answer)
        if answer["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert text.startswith("{")


BAD_STRUCTURES: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [5]}}, "structured_outputs.choice.0"),
    ({"structured_outputs": {"choice": ["a"] * 100_000}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": "nonsense ("}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "x" * 100_000}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("asked", "param"), BAD_STRUCTURES, ids=lambda value: str(value)[:60])
def test_a_structure_that_cannot_be_is_refused(
    tiny_server: LiveServer, path: str, asked: dict[str, Any], param: str
) -> None:
    with tiny_server.client() as client:
        for more in ({}, {"stream": True}):
            answer = client.post(path, json=ask(path) | asked | more)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param
            assert len(answer.text) < 1000


@settings(max_examples=15, deadline=None)
@given(
    options=st.lists(st.text('ab😎\n"\\', min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    stop=st.lists(st.sampled_from(["a", "b", "😎"]), max_size=2),
)
def test_a_choice_in_a_stream_is_the_same(
    exact_server: LiveServer, options: list[str], seed: int, stop: list[str]
) -> None:
    call = {"messages": MESSAGES, "seed": seed, "max_tokens": 30, "stop": stop}
    call |= {"structured_outputs": {"choice": options}}
    answer = post(exact_server, CHAT, **call)
    parts = [part["choices"][0] for part in stream(exact_server, CHAT, **call)]
    assert "".join(part["delta"].get("content", "") for part in parts) == texts(answer)[0]
    assert parts[-1]["stop_reason"] == answer["choices"][0]["stop_reason"]
    if answer["choices"][0]["stop_reason"] is None:
        assert texts(answer)[0] in options
    else:
        assert any(option.startswith(texts(answer)[0]) for option in options)


def test_a_model_has_aliases(serve: Callable[..., LiveServer], tiny_folder: Path) -> None:
    server = serve(tiny_folder, dtype="float32", served_model_aliases=("gpt-x", "org/other"))
    names = [server.name, "gpt-x", "org/other"]
    with server.client() as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == names
        for card in cards:
            assert client.get(f"/v1/models/{card['id']}").json() == card
        for name in names:
            for path in BODIES:
                answer = client.post(path, json=ask(path) | {"model": name, "max_tokens": 1})
                assert answer.status_code == 200
                assert answer.json()["model"] == server.name
        assert client.post(CHAT, json=ask(CHAT) | {"model": "gpt-y"}).status_code == 404


def test_logprobs_of_a_likely_token_are_of_the_model_itself(exact_server: LiveServer) -> None:
    """Before bias, temperature and cuts: a forced token keeps what the model gave it."""
    call = {"prompt": "a", "max_tokens": 1, "logprobs": 20, "temperature": 0}
    plain = post(exact_server, COMPLETIONS, **call)["choices"][0]["logprobs"]
    for more in ({"logit_bias": {"90": 100}}, {"temperature": 2, "top_k": 1, "logit_bias": {"90": 100}}):
        forced = post(exact_server, COMPLETIONS, **call | more)["choices"][0]["logprobs"]
        assert forced["tokens"] == ["Z"]
        assert forced["token_logprobs"][0] < plain["token_logprobs"][0]
        before, after = plain["top_logprobs"][0], dict(forced["top_logprobs"][0])
        if "Z" not in before:
            del after["Z"]
        assert close(sorted(after.items()), sorted(before.items()))
