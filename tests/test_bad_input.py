"""What must not be served: the dialect's own error before the first byte, and the next call works."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import LiveServer
from wire import FORMS, JSON, Form, without_id

LONG = "x" * 490
"""Leaves room for 22 tokens, so that the longest answers are short."""
SECRET = "zq9zq9zq9"
"""Stands in bad input; no error may repeat it."""
LEAKS = re.compile(SECRET + r"|Traceback|0x[0-9a-f]{6,}|/home/|/root/|/tmp/|\.py\b|site-packages")


@pytest.fixture(scope="module")
def client(tiny_server: LiveServer) -> Iterator[httpx.Client]:
    with tiny_server.client() as client:
        yield client
        tiny_server.wait_until_idle()


def message_of(path: str, answer: httpx.Response) -> str:
    """The text of an error, which must be the dialect's own object and tell nothing of the inside."""
    assert answer.headers["content-type"] == "application/json"
    assert not LEAKS.search(answer.text), answer.text
    assert len(answer.content) < 1000
    body = without_id(answer.json(), answer)
    if not path.startswith("/v1"):
        assert list(body) == ["error", "error_type"]
        return str(body["error"])
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return str(body["error"]["message"])


def refuse(client: httpx.Client, path: str, body: object, status: int | None = None, **options: Any) -> str:
    """Send what must be refused, and give the error's text."""
    if isinstance(body, str | bytes):
        answer = client.post(path, content=body, **({"headers": JSON} | options))
    else:
        answer = client.post(path, json=body)
    assert answer.status_code == (status or (400 if path.startswith("/v1") else 422)), answer.text
    if status is None:
        kind = answer.json()["error"]["type"] if path.startswith("/v1") else answer.json()["error_type"]
        assert kind == ("invalid_request_error" if path.startswith("/v1") else "validation")
    return message_of(path, answer)


def serves(client: httpx.Client) -> None:
    """The next good call is served."""
    for form in (FORMS[0], FORMS[4]):
        assert form.text(client.post(form.path, json=form.body("good", 3))) != ""


BIG = ("2147483648", "9223372036854775808", "18446744073709551616")
VALUES = (
    *("NaN", "Infinity", "-Infinity", '"nan"', "1e999", "-1", "0", *BIG, "1.5", '"3"', "true", "null"),
    *("[]", "{}"),
)
SIGNED = {"-1", "0", "1.5", "null"}
NATIVE = {
    "temperature": {"0", *BIG, "1.5", "null"},
    "repetition_penalty": {*BIG, "1.5", "null"},
    "frequency_penalty": SIGNED,
    "presence_penalty": SIGNED,
    "top_k": {*BIG, "null"},
    "top_p": {"null"},
    "min_p": {"0", "null"},
    "max_new_tokens": {"null"},
    "truncate": {"null"},
    "seed": {"0", *BIG[:2], "null"},
    "top_n_tokens": {"0", "null"},
    "best_of": {"null"},
    "typical_p": {"null"},
    "min_new_tokens": {"0", "null"},
    "min_tokens": {"0", "null"},
    "logit_bias": {"{}", "null"},
    "stop_token_ids": {"[]", "null"},
    "stop": {"[]"},
    "do_sample": {"true", "null"},
    "details": {"true"},
    "return_full_text": {"true", "null"},
    "grammar": {"null"},
}
"""Field -> the values above that are served."""
OPENAI = {
    "temperature": {"0", "1.5", "null"},
    "repetition_penalty": NATIVE["repetition_penalty"],
    "frequency_penalty": SIGNED,
    "presence_penalty": SIGNED,
    "top_k": {"-1", "0", *BIG, "null"},
    "top_p": {"null"},
    "min_p": {"0", "null"},
    "typical_p": {"null"},
    "max_tokens": {"null"},
    "min_tokens": {"0", "null"},
    "seed": NATIVE["seed"],
    "n": {"null"},
    "logit_bias": {"{}", "null"},
    "stop": {'"3"', '"nan"', "[]", "null"},
    "stop_token_ids": {"[]", "null"},
    "ignore_eos": {"true"},
    "stream": {"true", "null"},
    "stream_options": {"null"},
    "response_format": {"null"},
    "structured_outputs": {"null"},
    "user": {'"3"', '"nan"', "null"},
}
COMPLETIONS = OPENAI | {"logprobs": {"0", "null"}, "best_of": {"null"}, "echo": {"true"}}
CHAT = OPENAI | {
    "max_completion_tokens": {"null"},
    "logprobs": {"true", "null"},
    "top_logprobs": {"null"},
    "tools": {"[]", "null"},
    "tool_choice": {"null"},
    "parallel_tool_calls": {"true", "null"},
    "chat_template_kwargs": {"{}", "null"},
}
FIELDS = [
    (path, name, served)
    for path, fields in (
        ("/generate", NATIVE),
        ("/v1/completions", COMPLETIONS),
        ("/v1/chat/completions", CHAT),
    )
    for name, served in fields.items()
]


def with_field(path: str, name: str, value: str) -> str:
    """A body with one field as it stands, in JSON or nearly so."""
    field = f"{json.dumps(name)}: {value}"
    if path.startswith("/v1"):
        limit = "" if name.startswith("max") else '"max_tokens": 1, '
        if path.endswith("/chat/completions"):
            return f'{{"messages": [{{"role": "user", "content": "{LONG[20:]}"}}], {limit}{field}}}'
        return f'{{"prompt": "{LONG}", {limit}{field}}}'
    limit = "" if name == "max_new_tokens" else '"max_new_tokens": 1, '
    return f'{{"inputs": "{LONG}", "parameters": {{{limit}{field}}}}}'


@pytest.mark.parametrize(("path", "name", "served"), FIELDS, ids=[f"{f[0]} {f[1]}" for f in FIELDS])
def test_a_number_is_served_or_refused_by_name(
    client: httpx.Client, path: str, name: str, served: set[str]
) -> None:
    for value in VALUES:
        body = with_field(path, name, value)
        if value in served:
            answer = client.post(path, content=body, headers=JSON)
            assert answer.status_code == 200, (value, answer.text)
            continue
        error = client.post(path, content=body, headers=JSON)
        assert error.status_code == (400 if path.startswith("/v1") else 422), (value, error.text)
        message = message_of(path, error)
        if path.startswith("/v1"):
            assert error.json()["error"]["param"].partition(".")[0] == name
        else:
            assert re.search(rf"{name}[`.]", message), value
    serves(client)


RULES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": -1.5}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 512. Given: 0"),
    ({"truncate": 512}, "`truncate` must be strictly positive and less than 512. Given: 512"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"max_new_tokens": 511},
        "`inputs` tokens + `max_new_tokens` must be <= 512. "
        "Given: 4 `inputs` tokens and 511 `max_new_tokens`",
    ),
]
"""contracts.md 2.3, word for word, where we check the same."""


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("parameters", "message"), RULES, ids=lambda v: str(v)[:40])
def test_tgi_rules_in_tgi_words(
    client: httpx.Client, path: str, parameters: dict[str, Any], message: str
) -> None:
    body = {"inputs": "four", "parameters": parameters}
    assert refuse(client, path, body) == f"Input validation error: {message}"
    if path == "/":
        assert refuse(client, path, body | {"stream": True}) == f"Input validation error: {message}"


def test_prefill_is_not_told_in_a_stream(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"decoder_input_details": True, "max_new_tokens": 1}}
    message = "Input validation error: `decoder_input_details` == true is not supported when streaming tokens"
    assert refuse(client, "/generate_stream", body) == message
    assert refuse(client, "/", body | {"stream": True}) == message
    assert client.post("/", json=body).status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"watermark": True},
    ],
    ids=str,
)
def test_what_is_known_but_not_supported_is_refused(client: httpx.Client, parameters: dict[str, Any]) -> None:
    (name,) = parameters
    for path in ("/generate", "/generate_stream", "/"):
        body = {"inputs": "a", "parameters": parameters}
        assert refuse(client, path, body) == f"Input validation error: `{name}` is not supported"


@pytest.mark.parametrize(
    "parameters",
    [{"best_of": 1}, {"typical_p": 1.0}, {"watermark": False}, {"grammar": None}, {"adapter_id": None}],
    ids=str,
)
def test_what_asks_for_nothing_is_served(client: httpx.Client, parameters: dict[str, Any]) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1} | parameters}
    assert client.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/generate", {"inputs": ""}, "Input validation error: `inputs` cannot be empty"),
        ("/generate_stream", {"inputs": ""}, "Input validation error: `inputs` cannot be empty"),
        ("/", {"inputs": ""}, "Input validation error: `inputs` cannot be empty"),
        ("/generate", {}, "`inputs`"),
        ("/generate", {"inputs": None}, "`inputs`"),
        ("/generate", {"inputs": 5}, "`inputs`"),
        ("/generate", {"inputs": ["a"]}, "`inputs`"),
        ("/generate", {"inputs": "a", "parameters": []}, "`parameters`"),
        ("/generate", {"inputs": "a", "parameters": {"stop": "a"}}, "`parameters.stop`"),
        ("/generate", {"inputs": "a", "parameters": {"stop": [""]}}, "`stop`"),
        ("/generate", {"inputs": "a", "parameters": {"stop": [5]}}, "`parameters.stop.0`"),
        ("/generate", {"inputs": "a", "parameters": {"details": "yes"}}, "`parameters.details`"),
        ("/generate", {"inputs": "a", "parameters": {"do_sample": 1}}, "`parameters.do_sample`"),
        ("/", {"inputs": "a", "stream": "yes"}, "`stream`"),
        ("/v1/completions", {}, "`prompt`"),
        ("/v1/completions", {"prompt": ""}, "`prompt`"),
        ("/v1/completions", {"prompt": None}, "`prompt`"),
        ("/v1/completions", {"prompt": []}, "`prompt`"),
        ("/v1/completions", {"prompt": [[]]}, "`prompt`"),
        ("/v1/completions", {"prompt": [""]}, "`prompt`"),
        ("/v1/completions", {"prompt": ["a", ""]}, "`prompt`"),
        ("/v1/completions", {"prompt": [-1]}, "`prompt`"),
        ("/v1/completions", {"prompt": [260]}, "`prompt`"),
        ("/v1/completions", {"prompt": [2**31]}, "`prompt`"),
        ("/v1/completions", {"prompt": [2**64]}, "`prompt`"),
        ("/v1/completions", {"prompt": [1, 260]}, "`prompt`"),
        ("/v1/completions", {"prompt": [[1], [260]]}, "`prompt`"),
        ("/v1/completions", {"prompt": [True]}, "`prompt`"),
        ("/v1/completions", {"prompt": [1.5]}, "`prompt`"),
        ("/v1/completions", {"prompt": [1, "a"]}, "`prompt`"),
        ("/v1/completions", {"prompt": ["a", 1]}, "`prompt`"),
        ("/v1/completions", {"prompt": [[1], "a"]}, "`prompt`"),
        ("/v1/completions", {"prompt": [[[1]]]}, "`prompt`"),
        ("/v1/completions", {"prompt": {"a": 1}}, "`prompt`"),
        ("/v1/completions", {"prompt": "a", "stop": ""}, "`stop`"),
        ("/v1/completions", {"prompt": "a", "stop": [""]}, "`stop`"),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * 5}, "`stop`"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "`max_tokens`"),
        ("/v1/completions", {"prompt": "a", "temperature": 2.1}, "`temperature`"),
        ("/v1/completions", {"prompt": "a", "n": 17}, "`n`"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "`logprobs`"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "`stream_options`"),
        ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": 1}, "`stream_options`"),
        (
            "/v1/completions",
            {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}},
            "`stream_options.include_usage`",
        ),
        ("/v1/completions", {"prompt": "a", "min_tokens": 17}, "`min_tokens`"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "min_tokens": 4}, "`min_tokens`"),
        ("/v1/completions", {"prompt": "a", "typical_p": 1.1}, "`typical_p`"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [260]}, "`stop_token_ids`"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1]}, "`stop_token_ids`"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [2**70]}, "`stop_token_ids`"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 65}, "`stop_token_ids`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"260": 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"-1": 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 101}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": -101}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": None}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": True}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": "5"}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 2**70}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 1, "01": 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"\u0661": 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {SECRET: 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, "`logit_bias`"),
        ("/v1/completions", {"prompt": ["a"] * 65}, "`prompt`"),
        ("/v1/chat/completions", {}, "`messages`"),
        ("/v1/chat/completions", {"messages": []}, "`messages`"),
        ("/v1/chat/completions", {"messages": "hi"}, "`messages`"),
        ("/v1/chat/completions", {"messages": [5]}, "`messages.0`"),
        ("/v1/chat/completions", {"messages": [{}]}, "`messages.0.role`"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "`messages.0.content`"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "`messages.0.content`"),
        ("/v1/chat/completions", {"messages": [{"role": 1, "content": "a"}]}, "`messages.0.role`"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": []}]}, "`messages.0.content`"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
            "`messages.0.tool_calls.0.function.name`",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}
                ]
            },
            "`messages.0.content",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            "`top_logprobs`",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21},
            "`top_logprobs`",
        ),
        ("/tokenize", {}, "`inputs`"),
        ("/tokenize", {"inputs": "a", "prompt": "a"}, "`inputs`"),
        ("/tokenize", {"messages": []}, "`messages`"),
        ("/detokenize", {}, "`tokens`"),
        ("/detokenize", {"tokens": [260]}, "`tokens`"),
        ("/detokenize", {"tokens": [-1]}, "`tokens`"),
        ("/detokenize", {"tokens": [2**64]}, "`tokens`"),
        ("/detokenize", {"tokens": ["a"]}, "`tokens.0`"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:70],
)
def test_a_bad_field_is_named(client: httpx.Client, path: str, body: dict[str, Any], text: str) -> None:
    assert text in refuse(client, path, body | {"unknown": SECRET})
    serves(client)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_prompt_that_is_too_long(client: httpx.Client, form: Form) -> None:
    """Both numbers are told."""
    for length in (512, 600, 1_900_000):
        answer = client.post(form.path, json=form.body("x" * length, 1))
        assert answer.status_code == (400 if form.is_openai else 422)
        message = message_of(form.path, answer)
        count = length
        if form.path == "/v1/chat/completions":
            count += len("user\n") + len("\nassistant\n") + 3
            assert "512 tokens" in message and f"{count} tokens" in message
        elif form.is_openai:
            assert message == (
                f"This model's maximum context length is 512 tokens, and the prompt has {length} tokens."
            )
            assert answer.json()["error"]["code"] == "context_length_exceeded"
        else:
            wanted = f"Input validation error: `inputs` must have less than 512 tokens. Given: {length}"
            assert message == wanted
    assert form.text(client.post(form.path, json=form.body("x", 1))) is not None


def test_more_tokens_than_fit(client: httpx.Client) -> None:
    message = refuse(client, "/v1/completions", {"prompt": "four", "max_tokens": 509})
    assert message == (
        "This model's maximum context length is 512 tokens, and 513 were asked for: 4 in the prompt and 509 "
        "in the completion."
    )
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": [{"role": "user", "content": "a"}], name: 511}
        assert "512 tokens" in refuse(client, "/v1/chat/completions", body)
    assert client.post("/v1/completions", json={"prompt": "x" * 508, "max_tokens": 4}).status_code == 200


PATHS = [*dict.fromkeys(form.path for form in FORMS), "/tokenize", "/detokenize"]
BROKEN = {
    "cut": b'{"inputs": "' + SECRET.encode(),
    "empty": b"",
    "a list": b'["' + SECRET.encode() + b'"]',
    "null": b"null",
    "a number": b"5",
    "a string": b'"' + SECRET.encode() + b'"',
    "two values": b'{"inputs": "a"} {}',
    "a comma": b'{"inputs": "a",}',
    "single quotes": b"{'inputs': '" + SECRET.encode() + b"'}",
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "deep list": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "long integer": b'{"inputs": "a", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "long field name": b'{"' + SECRET.encode() * 100_000 + b'": 1}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_request(client: httpx.Client, path: str, body: bytes) -> None:
    started = time.perf_counter()
    refuse(client, path, body)
    assert time.perf_counter() - started < 1
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "media_type",
    ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", "", None],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_body_that_is_not_declared_as_json(client: httpx.Client, path: str, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    message = refuse(client, path, b'{"inputs": "a", "prompt": "a"}', headers=headers)
    assert "Content-Type: application/json" in message
    for good in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        body = b'{"inputs": "a", "prompt": "a", "parameters": {"max_new_tokens": 1}}'
        assert client.post(path, content=body, headers={"Content-Type": good}).status_code == 200


SURROGATE = "\ud800"
SURROGATES = [
    ("/generate", {"inputs": SURROGATE}),
    ("/generate", {"inputs": "a", "parameters": {"stop": ["a", "b" + SURROGATE]}}),
    ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": SURROGATE}}}),
    ("/generate", {"inputs": "a", "parameters": {"adapter_id": SURROGATE}}),
    ("/generate_stream", {"inputs": "a" + SURROGATE}),
    ("/", {"inputs": "a\udc00b"}),
    ("/v1/completions", {"prompt": SURROGATE}),
    ("/v1/completions", {"prompt": ["a", SURROGATE]}),
    ("/v1/completions", {"prompt": "a", "stop": SURROGATE}),
    ("/v1/completions", {"prompt": "a", "stop": ["a", SURROGATE]}),
    ("/v1/completions", {"prompt": "a", "model": SURROGATE}),
    ("/v1/completions", {"prompt": "a", "user": SURROGATE}),
    ("/v1/completions", {"prompt": "a", "suffix": SURROGATE}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": SURROGATE}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {SURROGATE: 1}}}),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": [SURROGATE]}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {SURROGATE: 1}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": SURROGATE}]}),
    ("/v1/chat/completions", {"messages": [{"role": SURROGATE, "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": SURROGATE}]}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SURROGATE}]}]},
    ),
    ("/tokenize", {"inputs": SURROGATE}),
    ("/tokenize", {"prompt": SURROGATE}),
    ("/tokenize", {"messages": [{"role": "user", "content": SURROGATE}]}),
]


@pytest.mark.parametrize(("path", "body"), SURROGATES, ids=lambda value: ascii(value)[:70])
def test_lone_surrogates_are_refused(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    refuse(client, path, json.dumps(body))
    serves(client)


def test_surrogates_where_nobody_looks_do_no_harm(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1, SURROGATE: 1}, "x": SURROGATE}
    assert client.post("/generate", content=json.dumps(body), headers=JSON).status_code == 200


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "prompt", ["\0", "a\0b", "\ufeff", "\u202e", "<|eos|>", "<|im_end|><|im_start|>system", "\r\n"]
)
def test_odd_prompts_are_served(client: httpx.Client, form: Form, prompt: str) -> None:
    assert isinstance(form.text(client.post(form.path, json=form.body(prompt, 4))), str)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_large_body_is_not_read(tiny_server: LiveServer, client: httpx.Client, path: str) -> None:
    body = b'{"inputs": "' + b"x" * 10_000_000 + b'"}'

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 65536

    for content in (body, endless()):
        with tiny_server.client() as own:
            message = refuse(own, path, body, 413) if content is body else None
            if message is None:
                answer = own.post(path, content=content, headers=JSON)
                assert answer.status_code == 413
                message = message_of(path, answer)
            assert "2000000 bytes" in message
    # The declared length is enough: nothing of the body is waited for.
    with socket.create_connection(("127.0.0.1", tiny_server.port), timeout=2) as connection:
        fields = ("Host: x", "Content-Type: application/json", "Content-Length: 2000001", "", "")
        connection.sendall("\r\n".join((f"POST {path} HTTP/1.1", *fields)).encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    most = b'{"inputs": 5, "prompt": {}, "x": "' + b"x" * (2_000_000 - 36) + b'"}'
    assert len(most) == 2_000_000
    refuse(client, path, most)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a", "parameters": {"stop": ["a"] * 100_000}}),
        ("/generate", {"inputs": "a", "parameters": {"stop": [""] * 100_000}}),
        ("/generate", {"inputs": "a", "parameters": {"stop": [5] * 100_000}}),
        ("/generate", {"inputs": "a", "parameters": {"best_of": 10**6}}),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * 100_000}),
        ("/v1/completions", {"prompt": ["a"] * 100_000}),
        ("/v1/completions", {"prompt": [[1]] * 100_000}),
        ("/v1/completions", {"prompt": [260] * 100_000}),
        ("/v1/completions", {"prompt": "a", "n": 10**6}),
        ("/v1/completions", {"prompt": "a", "best_of": 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 10**6}),
        ("/v1/chat/completions", {"messages": [{}] * 100_000}),
        ("/v1/chat/completions", {"messages": [{"role": "a", "tool_calls": [{}] * 100_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "u", "content": "a"}], "tools": [{}] * 100_000}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(100_000)}}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 100_000}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a"] * 100_000}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 100_000}]}),
        ("/detokenize", {"tokens": [-1] * 100_000}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_flood_is_refused_at_once(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    started = time.perf_counter()
    refuse(client, path, content)
    assert time.perf_counter() - started < 1
    serves(client)


def test_a_long_stop_string_costs_little(client: httpx.Client) -> None:
    """What almost matches at every place is still searched in linear time."""
    body = {"inputs": "a", "parameters": {"stop": ["a" * 100_000 + "b"] * 4, "max_new_tokens": 8}}
    started = time.perf_counter()
    assert client.post("/generate", json=body).status_code == 200
    assert time.perf_counter() - started < 2


def test_other_paths_and_methods(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/generate", 405),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", f"/{SECRET}/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "//v1/completions", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, path
        message_of(path, answer)
        if status == 405:
            assert answer.headers["allow"]


def test_a_stream_that_is_refused_has_a_status(client: httpx.Client) -> None:
    """Unlike TGI, which answers 200 and then an error event."""
    for form in FORMS:
        if form.stream:
            answer = client.post(form.path, json=form.body("", 1) if not form.is_openai else {"stream": True})
            assert answer.status_code in (400, 422)
            assert answer.headers["content-type"] == "application/json"


EXTREMES: list[Any] = [
    {"temperature": 1e-300},
    {"temperature": 1e-45},
    {"temperature": 1e-30},
    {"temperature": 1.7e308},
    {"top_p": 1e-300},
    {"top_p": 0.9999999999999999},
    {"min_p": 1e-300},
    {"min_p": 1.0},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e-30},
    {"repetition_penalty": 1.7e308},
    {"temperature": 1e-30, "repetition_penalty": 1e30},
    {"temperature": 1e-30, "top_p": 1e-30, "min_p": 1.0, "top_k": 1},
]


@pytest.mark.parametrize("parameters", EXTREMES, ids=str)
def test_extreme_numbers_fail_nobody(
    tiny_server: LiveServer, client: httpx.Client, parameters: dict[str, float]
) -> None:
    """Such a call is served or refused; one that runs beside it is not touched."""
    victim = FORMS[1]
    alone = victim.text(client.post(victim.path, json=victim.body("victim", 150)))
    body = {"inputs": "all", "parameters": {"max_new_tokens": 8, "do_sample": True, "seed": 1} | parameters}
    with client.stream("POST", victim.path, json=victim.body("victim", 150)) as answer:
        lines = answer.iter_lines()
        for _ in range(5):
            next(lines)
        with tiny_server.client() as other:
            for _ in range(2):
                assert other.post("/generate", json=body).status_code in (200, 422)
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["generated_text"] == alone


@pytest.mark.parametrize("depth", [100, 400, 900, 3000])
@pytest.mark.parametrize("inner", ["NaN", "1e999", '"\\ud800"', "9" * 4000, '"x"'], ids=lambda v: v[:8])
def test_free_objects_of_a_chat_fail_nobody(client: httpx.Client, inner: str, depth: int) -> None:
    """Schemas and template values may hold any JSON: it is used or refused, however odd and deep."""
    value = '{"a": ' * depth + inner + "}" * depth
    message = '"messages": [{"role": "user", "content": "a"}], "max_tokens": 1'
    function = f'{{"name": "f", "parameters": {value}}}'
    for field in (
        f'"chat_template_kwargs": {value}',
        f'"structured_outputs": {{"json": {value}}}',
        f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {value}}}}}',
        f'"tools": [{{"type": "function", "function": {function}}}]',
        f'"tool_choice": "required", "tools": [{{"type": "function", "function": {function}}}]',
    ):
        answer = client.post("/v1/chat/completions", content=f"{{{message}, {field}}}", headers=JSON)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            message_of("/v1/chat/completions", answer)
