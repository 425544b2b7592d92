"""Tools and reasoning in OpenAI's chat: what a model says as calls, deltas and messages, on live servers."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import EOS, VOCAB_SIZE, byte_tokenizer, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from openai import OpenAI
from test_api_openai import CHAT, post, stream
from tokenizers import Tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}<tool_call>\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.arguments | tojson }}]{% endfor %}"
    "{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}{{ '\n' }}{% endfor %}"
    "{{ say }}{% if open %}<think>{% endif %}"
)
"""Knows tools and reasoning; its own value `say` is the last token, and so what the model goes on with."""

OSLO = [
    "Let me ",
    "see.\n<tool",
    '_call>\n{"name": "weather", ',
    '"arguments": {"city": "Oslo"}}\n</tool_',
    "call>",
]
TWO = [
    '<tool_call>\n{"name": "weather", "arguments": {}}',
    '\n</tool_call>\n<tool_call>{"name": "time"',
    "}</tool_call>\n",
]
BROKEN = ["<tool_call>nothing", " of the kind</tool_call>"]
THOUGHT = ["<thi", "nk>\nHm", "m.\n</think>\n", "\nYes", "."]
OPENED = ["Well", ".</thi", "nk>No"]
LOUD = ["<think>so", '</think><tool_call>{"name":"time"}', "</tool_call> "]
SCRIPTS = {"1": OSLO, "2": TWO, "3": BROKEN, "4": THOUGHT, ">": OPENED, "5": LOUD}
"""Last token of the prompt -> what the model says after it, a token each."""

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "w", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time"}},
]
MESSAGES = [{"role": "user", "content": "hi"}]


def call(script: str, **more: object) -> dict[str, Any]:
    """A conversation after which the model says the script."""
    values = {"say": script} if script != ">" else {"say": "", "open": True}
    return {"messages": MESSAGES, "chat_template_kwargs": values, "temperature": 0} | more


@pytest.fixture(scope="module")
def server(serve: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """A model that says the SCRIPTS: each of their pieces is a token, which knows the next."""
    folder = tmp_path_factory.mktemp("talker")
    byte_tokenizer(folder)
    pieces = [piece for script in SCRIPTS.values() for piece in script]
    assert len(set(pieces)) == len(pieces)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.add_tokens(pieces) == len(pieces)
    tokenizer.save(str(path))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    size = VOCAB_SIZE + len(pieces)
    successors = dict.fromkeys(range(size), EOS)
    for first, script in SCRIPTS.items():
        ids = [ord(first), *(tokenizer.token_to_id(piece) for piece in script)]
        successors |= dict(itertools.pairwise(ids))
    shape = {"layers": 1, "hidden_size": 320, "intermediate_size": 32, "max_positions": 4096}
    model = make_llama(folder, tie=False, vocab_size=size, **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for token, successor in successors.items():
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[successor, token] = 3.0
    model.save_pretrained(folder)
    return serve(folder, dtype="float32")


@pytest.fixture(scope="module")
def random_server(serve: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """A random model with room for tools in its prompt, and a template that knows none."""
    folder = tmp_path_factory.mktemp("random")
    byte_tokenizer(folder)
    make_llama(folder, tie=True, seed=1, head_dim=32, max_positions=4096)
    return serve(folder, dtype="float32", prefix_cache=False)


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message or delta whose calls have ids, which are new each time."""
    for made in message.get("tool_calls", ()):
        assert made.pop("id").startswith("call_")
    return message


def function(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASSISTANT = {"role": "assistant"}
CALLED = function("weather", '{"city": "Oslo"}')
ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "1": ({"content": "Let me see.", "tool_calls": [CALLED]}, "tool_calls"),
    "2": ({"content": None, "tool_calls": [function("weather", "{}"), function("time", "{}")]}, "tool_calls"),
    "3": ({"content": "".join(BROKEN)}, "stop"),
    "4": ({"content": "Yes.", "reasoning_content": "Hmm."}, "stop"),
    ">": ({"content": "No", "reasoning_content": "Well."}, "stop"),
    "5": ({"content": None, "reasoning_content": "so", "tool_calls": [function("time", "{}")]}, "tool_calls"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_message_has_its_parts(server: LiveServer, script: str) -> None:
    (choice,) = post(server, CHAT, **call(script, tools=TOOLS))["choices"]
    message, reason = ANSWERS[script]
    assert without_ids(choice["message"]) == ASSISTANT | message
    assert choice["finish_reason"] == reason
    assert choice["stop_reason"] is None


def deltas(server: LiveServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [part["choices"][0] for part in stream(server, CHAT, **body)]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    return [*(without_ids(part["delta"]) for part in parts[:-1]), {"finish": parts[-1]["finish_reason"]}]


def test_a_stream_with_a_call(server: LiveServer) -> None:
    assert deltas(server, call("1", tools=TOOLS)) == [
        {"role": "assistant", "content": ""},
        {"content": "Let me"},
        {"content": " see."},
        {"tool_calls": [{"index": 0} | CALLED]},
        {"finish": "tool_calls"},
    ]


def test_a_stream_with_two_calls(server: LiveServer) -> None:
    assert deltas(server, call("2", tools=TOOLS)) == [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0} | function("weather", "{}")]},
        {"tool_calls": [{"index": 1} | function("time", "{}")]},
        {"finish": "tool_calls"},
    ]


def test_a_stream_with_reasoning(server: LiveServer) -> None:
    assert deltas(server, call("4")) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "m."},
        {"content": "Yes"},
        {"content": "."},
        {"finish": "stop"},
    ]


def test_one_call_at_a_time(server: LiveServer) -> None:
    body = call("2", tools=TOOLS, parallel_tool_calls=False)
    (choice,) = post(server, CHAT, **body)["choices"]
    assert without_ids(choice["message"])["tool_calls"] == [function("weather", "{}")]
    assert [next(iter(delta)) for delta in deltas(server, body)] == ["role", "tool_calls", "finish"]


@pytest.mark.parametrize("more", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}], ids=str)
def test_without_tools_a_call_is_text(server: LiveServer, more: dict[str, Any]) -> None:
    """And the tools that must not be called are not shown."""
    answer = post(server, CHAT, **call("1", **more))
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "".join(OSLO)}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len("user: hi\n1")


def test_what_is_cut_is_no_call(server: LiveServer) -> None:
    (choice,) = post(server, CHAT, **call("1", tools=TOOLS, max_tokens=3))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "".join(OSLO[:3])}
    assert choice["finish_reason"] == "length"
    (choice,) = post(server, CHAT, **call("2", tools=TOOLS, max_tokens=2))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "length"


def test_logprobs_are_of_every_token(server: LiveServer) -> None:
    for script, pieces in SCRIPTS.items():
        body = call(script, tools=TOOLS, logprobs=True)
        (choice,) = post(server, CHAT, **body)["choices"]
        told = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert told == [*pieces, "<|eos|>"]
        parts = [part["choices"][0] for part in stream(server, CHAT, **body)]
        streamed = [e["token"] for p in parts if p["logprobs"] for e in p["logprobs"]["content"]]
        assert streamed == told


@settings(max_examples=30, deadline=None)
@given(
    script=st.sampled_from(list(SCRIPTS)),
    tools=st.booleans(),
    parallel=st.booleans(),
    max_tokens=st.integers(1, 9),
    n=st.integers(1, 2),
    stop=st.sampled_from([None, "see", "</", ["o", "."], "}"]),
    logprobs=st.booleans(),
)
def test_a_stream_adds_up_to_the_message(
    server: LiveServer,
    script: str,
    tools: bool,
    parallel: bool,
    max_tokens: int,
    n: int,
    stop: Any,
    logprobs: bool,
) -> None:
    body = call(script, max_tokens=max_tokens, n=n, stop=stop, logprobs=logprobs)
    body |= {"tools": TOOLS, "parallel_tool_calls": parallel} if tools else {}
    answer = post(server, CHAT, **body)
    parts = [choice for part in stream(server, CHAT, **body) for choice in part["choices"]]
    for choice in answer["choices"]:
        mine = [part for part in parts if part["index"] == choice["index"]]
        message = without_ids(choice["message"])
        for name in ("content", "reasoning_content"):
            assert "".join(c["delta"].get(name) or "" for c in mine) == (message.get(name) or "")
        calls = [made for c in mine for made in without_ids(c["delta"]).get("tool_calls", ())]
        assert [made.pop("index") for made in calls] == list(range(len(calls)))
        assert calls == message.get("tool_calls", [])
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_call_that_is_required_follows_its_schema(
    random_server: LiveServer, choice: str, parallel: bool
) -> None:
    """However random the model: the grammar leaves it nothing else."""
    wanted = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": wanted, "parallel_tool_calls": parallel}
    ended = 0
    for seed in range(4):
        sampled = body | {"seed": seed, "max_tokens": 300}
        (answer,) = post(random_server, CHAT, **sampled)["choices"]
        if answer["finish_reason"] == "length":
            continue
        ended += 1
        assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
        calls = answer["message"]["tool_calls"]
        assert answer["message"]["content"] is None
        assert len(calls) == 1 or parallel
        assert len({made["id"] for made in calls}) == len(calls)
        for made in calls:
            assert made["function"]["name"] in (("weather", "time") if choice == "required" else (choice,))
            arguments = json.loads(made["function"]["arguments"])
            if made["function"]["name"] == "weather":
                assert set(arguments) == {"city", "now"}
                assert arguments["city"] in ("Oslo", "Rome") and isinstance(arguments["now"], bool)
        streamed = [d for d in deltas(random_server, sampled) if "tool_calls" in d]
        said = [made for delta in streamed for made in delta["tool_calls"]]
        assert [made["function"] for made in said] == [made["function"] for made in calls]
    assert ended


def test_a_template_without_tools_is_told_of_them(random_server: LiveServer) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    plain = post(random_server, CHAT, **body)["usage"]["prompt_tokens"]
    told = post(random_server, CHAT, **body, tools=TOOLS)["usage"]["prompt_tokens"]
    assert told > plain + len(json.dumps(WEATHER))
    hidden = post(random_server, CHAT, **body, tools=TOOLS, tool_choice="none")["usage"]["prompt_tokens"]
    assert hidden == plain


def test_template_values_reach_the_template(server: LiveServer) -> None:
    for say, length in (("", 0), ("xyz", 3)):
        body = call("", max_tokens=1, chat_template_kwargs={"say": say})
        assert post(server, CHAT, **body)["usage"]["prompt_tokens"] == len("user: hi\n") + length


def test_calls_and_results_reach_the_template(server: LiveServer) -> None:
    """A conversation goes on with what the model called, whose arguments the template sees as an object."""
    made = {"id": "call_7", "type": "function", "function": {"name": "time", "arguments": '{"zone":  "x"}'}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_7", "content": "noon"},
    ]
    written = 'system: d\nuser: hi\nassistant: [{"zone": "x"}]\ntool: noon(call_7)\n'
    with server.client() as client:
        answer = client.post("/chat_tokenize", json={"messages": messages})
        assert answer.json()["templated_text"] == written
    answer = post(server, CHAT, **call("4", messages=messages))
    assert answer["usage"]["prompt_tokens"] == len(written + "4")
    assert answer["choices"][0]["message"]["content"] == "Yes."


def test_structure_after_reasoning_that_the_prompt_opened(server: LiveServer) -> None:
    """The reasoning stays free, and what follows it has its form: the model would have said No and ended."""
    body = call(">", structured_outputs={"choice": ["Nope", "Oops"]}, max_tokens=40, ignore_eos=True)
    (choice,) = post(server, CHAT, **body)["choices"]
    assert choice["message"]["reasoning_content"] == "Well."
    assert choice["message"]["content"] == "Nope"


NAMED = {"type": "function", "function": {"name": "f"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools.0"),
    ({"tools": [{}]}, "tools.0.type"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]}, "tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools.0.function.parameters",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
    ({"tools": [NAMED, NAMED]}, "tools"),
    ({"tools": [NAMED] * 129}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": 5}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "nothing"}}}},
                }
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"raise_exception": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": 10**30}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [1] * 10_000}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": "y" * 100_000}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("more", "param"), BAD, ids=lambda value: str(value)[:70])
def test_a_bad_field_is_named(server: LiveServer, more: dict[str, Any], param: str) -> None:
    with server.client() as client:
        for streamed in (False, True):
            answer = client.post(CHAT, json={"messages": MESSAGES, "stream": streamed} | more)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == param, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert len(answer.text) < 1000


def test_structure_goes_with_tools_that_must_not_be_called(server: LiveServer) -> None:
    more = {"tools": TOOLS, "tool_choice": "none", "structured_outputs": {"choice": ["ok"]}}
    (choice,) = post(server, CHAT, **call("", max_tokens=9) | more)["choices"]
    assert choice["message"]["content"] == "ok"


def test_openai_s_own_client_reads_the_calls(server: LiveServer) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        body = {"model": server.name, "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
        extra = {"extra_body": {"chat_template_kwargs": {"say": "1"}}}
        answer = client.chat.completions.create(**body, **extra).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == "Let me see."
        (made,) = answer.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Oslo"})
        messages = [
            *MESSAGES,
            answer.message.model_dump(),
            {"role": "tool", "tool_call_id": made.id, "content": "Rain."},
        ]
        again = {"extra_body": {"chat_template_kwargs": {"say": "4"}}}
        after = client.chat.completions.create(**body | {"messages": messages}, **again).choices[0]
        assert (after.message.content, after.finish_reason) == ("Yes.", "stop")
        with client.chat.completions.stream(**body, **extra) as events:
            final = events.get_final_completion().choices[0]
        assert final.message.content == "Let me see."
        assert final.message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
