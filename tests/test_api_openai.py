"""OpenAI's routes on a live server: every chunk and answer as its clients know it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import EOS, IM_START
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveServer
from wire import chunks, close, metric, payloads, without_id

from server.routes.openai_answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = "A😎é漢. BCD"
"""What the script model says after a chat template, which ends with a line end; every byte is a token."""
PIECES = ["A", "😎", "é", "漢", ".", " ", "B", "C", "D"]
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_TOKENS = len("user\nhi\nassistant\n") + 3
"""Length of that prompt, in the template of the tests' tokenizer."""


ANSWERS = {CHAT: ChatCompletion, COMPLETIONS: Completion}
CHUNKS = {CHAT: ChatCompletionChunk, COMPLETIONS: CompletionChunk}


def post(server: LiveServer, path: str, **body: object) -> dict[str, Any]:
    """The JSON of an answer, which is as /openapi.json describes it."""
    with server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    ANSWERS[path].model_validate_json(answer.content)
    return dict(answer.json())


def stream(server: LiveServer, path: str, **body: object) -> list[dict[str, Any]]:
    """The chunks of a stream, which are as /openapi.json describes them."""
    with server.client() as client:
        answer = client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    for payload in payloads(answer.text)[:-1]:
        CHUNKS[path].model_validate_json(payload)
    return chunks(answer.text)


def ask(path: str) -> dict[str, Any]:
    """The prompt of a path, as long for both."""
    return {"messages": MESSAGES} if path == CHAT else {"prompt": "9"}


def chat_chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return choice if finish is None else choice | {"stop_reason": None}


def text_chunk(text: str, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    return choice if finish is None else choice | {"stop_reason": None}


def test_a_chat_answer(script_server: LiveServer) -> None:
    answer = post(script_server, CHAT, model=script_server.name, messages=MESSAGES)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer["id"])
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == script_server.name
    message = {"role": "assistant", "content": TEXT}
    ended = {"logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [{"index": 0, "message": message} | ended]
    count = len(TEXT.encode()) + 1
    assert {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": CHAT_TOKENS,
        "completion_tokens": count,
        "total_tokens": CHAT_TOKENS + count,
    }


def test_a_chat_stream(script_server: LiveServer) -> None:
    parts = stream(script_server, CHAT, messages=MESSAGES)
    assert [list(part) for part in parts] == [
        ["id", "object", "created", "model", "system_fingerprint", "choices"]
    ] * len(parts)
    assert len({part["id"] for part in parts}) == 1
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", parts[0]["id"])
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["created"] for part in parts}) == 1
    assert {part["model"] for part in parts} == {script_server.name}
    assert [part["choices"] for part in parts] == [
        [chat_chunk({"role": "assistant", "content": ""})],
        *([chat_chunk({"content": piece})] for piece in PIECES),
        [chat_chunk({}, "stop")],
    ]


def test_a_completion(script_server: LiveServer) -> None:
    answer = post(script_server, COMPLETIONS, model=script_server.name, prompt="9", max_tokens=50)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert re.fullmatch("cmpl-[0-9a-f]{24}", answer["id"])
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [text_chunk("\n" + TEXT, "stop")]
    count = len(TEXT.encode()) + 2
    usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": 1 + count}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_completion_stream(script_server: LiveServer) -> None:
    """The text and the reason come in one last chunk, where there is text left."""
    parts = stream(script_server, COMPLETIONS, prompt="9", max_tokens=50)
    assert len({(part["id"], part["created"], part["object"], part["model"]) for part in parts}) == 1
    assert re.fullmatch("cmpl-[0-9a-f]{24}", parts[0]["id"])
    assert [part["choices"] for part in parts] == [
        *([text_chunk(piece)] for piece in ["\n", *PIECES]),
        [text_chunk("", "stop")],  # EOS has no text
    ]
    parts = stream(script_server, COMPLETIONS, prompt="9", max_tokens=2)
    assert [part["choices"] for part in parts] == [[text_chunk("\n")], [text_chunk("A", "length")]]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_framing_of_a_stream(script_server: LiveServer, path: str) -> None:
    with script_server.client() as client:
        answer = client.post(path, json=ask(path) | {"stream": True})
        other = client.post(path, json=ask(path) | {"stream": True})
    assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
    assert answer.headers["x-accel-buffering"] == "no"
    assert payloads(answer.text)[-1] == "[DONE]"
    assert answer.text.count("[DONE]") == 1
    assert answer.text.endswith("data: [DONE]\n\n")
    assert chunks(answer.text)[0]["id"] != chunks(other.text)[0]["id"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_once_at_the_end_if_asked_for(script_server: LiveServer, path: str) -> None:
    call = ask(path) | {"max_tokens": 4, "n": 2}
    *parts, last = stream(script_server, path, **call, stream_options={"include_usage": True})
    assert all("usage" not in part for part in parts)
    assert list(last) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert last["id"] == parts[0]["id"]
    assert last["choices"] == []
    prompt_tokens = CHAT_TOKENS if path == CHAT else 1
    assert last["usage"]["prompt_tokens"] == prompt_tokens
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["total_tokens"] == prompt_tokens + 8
    assert last["usage"] == post(script_server, path, **call)["usage"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_with_every_chunk_if_asked_for(script_server: LiveServer, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = stream(script_server, path, **ask(path), max_tokens=6, stream_options=options)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert counts[0] <= 1
    for used in (part["usage"] for part in parts):
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    only = {"continuous_usage_stats": True}  # means nothing alone
    parts = stream(script_server, path, **ask(path), max_tokens=6, stream_options=only)
    assert all("usage" not in part and part["choices"] for part in parts)


def test_chat_logprobs(tiny_server: LiveServer) -> None:
    call = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    (choice,) = post(tiny_server, CHAT, **call, logprobs=True, top_logprobs=2)["choices"]
    assert list(choice["logprobs"]) == ["content"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert len(entry["top_logprobs"]) == 2
        assert [list(top) for top in entry["top_logprobs"]] == [["token", "logprob", "bytes"]] * 2
        assert entry["top_logprobs"][0].items() <= entry.items()  # greedy
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    assert (
        bytes(b for entry in content for b in entry["bytes"]).decode("utf-8", "replace")
        == (choice["message"]["content"])
    )
    (plain,) = post(tiny_server, CHAT, **call, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[]] * 12
    assert post(tiny_server, CHAT, **call, logprobs=False)["choices"][0]["logprobs"] is None
    streamed = [
        entry
        for part in stream(tiny_server, CHAT, **call, logprobs=True, top_logprobs=2)
        for entry in (part["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert close(streamed, content)


def test_chat_logprobs_come_with_the_text_they_belong_to(script_server: LiveServer) -> None:
    parts = stream(script_server, CHAT, messages=MESSAGES, logprobs=True)
    found = [
        (choice["delta"].get("content"), [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]])
        for part in parts
        for choice in part["choices"]
        if choice["logprobs"] is not None
    ]
    eos = ("", [b"<|eos|>"])
    assert found == [*((piece, [bytes([b]) for b in piece.encode()]) for piece in PIECES), eos]


def test_completion_logprobs(tiny_server: LiveServer) -> None:
    call = {"prompt": "Hé", "max_tokens": 6, "temperature": 0}
    (choice,) = post(tiny_server, COMPLETIONS, **call, logprobs=2)["choices"]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert all(len(values) == 6 for values in logprobs.values())
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())  # greedy
        assert 1 <= len(top) <= 3  # bytes that are no characters share a name
    offsets = [0]
    for token in logprobs["tokens"][:-1]:
        offsets.append(offsets[-1] + len(token))
    assert logprobs["text_offset"] == offsets
    (none,) = post(tiny_server, COMPLETIONS, **call, logprobs=0)["choices"]
    assert none["logprobs"]["token_logprobs"] == logprobs["token_logprobs"]
    assert all(len(top) == 1 for top in none["logprobs"]["top_logprobs"])
    parts = stream(tiny_server, COMPLETIONS, **call, logprobs=2)
    for name, values in logprobs.items():
        pieces = [part["choices"][0]["logprobs"] for part in parts]
        assert [value for piece in pieces if piece for value in piece[name]] == values


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echo(tiny_server: LiveServer, max_tokens: int) -> None:
    call = {"prompt": "Hé", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    if max_tokens:
        after = post(tiny_server, COMPLETIONS, **call, logprobs=1)["choices"][0]
    else:
        after = {"text": "", "logprobs": {"token_logprobs": [], "tokens": []}}
    answer = post(tiny_server, COMPLETIONS, **call, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "Hé" + after["text"]
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["H", "\ufffd", "\ufffd", *after["logprobs"]["tokens"]]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["token_logprobs"][3:] == pytest.approx(after["logprobs"]["token_logprobs"], abs=1e-4)
    assert answer["usage"]["completion_tokens"] == max_tokens
    plain = post(tiny_server, COMPLETIONS, **call, echo=True)["choices"][0]
    assert plain["logprobs"] is None
    assert plain["text"] == choice["text"]
    parts = stream(tiny_server, COMPLETIONS, **call, echo=True, logprobs=1)
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    assert parts[0]["choices"][0]["text"].startswith("Hé")
    pieces = [part["choices"][0]["logprobs"] for part in parts]
    streamed = [value for piece in pieces if piece for value in piece["token_logprobs"]]
    assert streamed[0] is None
    assert streamed[1:] == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-4)


def test_echo_of_each_prompt(tiny_server: LiveServer) -> None:
    prompts = ["one", "two", "three"]
    choices = post(tiny_server, COMPLETIONS, prompt=prompts, max_tokens=3, echo=True, n=2)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for choice in choices:
        assert choice["text"].startswith(prompts[choice["index"] // 2])


SERVERS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "small steps": {"max_running": 5, "token_budget": 5},
    "no prefix cache": {"prefix_cache": False},
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 3, "top_p": 0.95}])
def test_decode_and_echo_agree(
    serve: Callable[..., LiveServer], tiny_folder: Path, server: str, sampling: dict[str, Any]
) -> None:
    """The log-probabilities of an output are those of the same tokens as a prompt (SGLang's check)."""
    live = serve(tiny_folder, dtype="float32", **SERVERS[server])
    prompt = list(b"self-consistency of a prompt that fills blocks")
    parameters = {"max_new_tokens": 60, "details": True, "ignore_eos": True} | sampling
    with live.client() as client:
        body = {"inputs": bytes(prompt).decode(), "parameters": parameters}
        tokens = client.post("/generate", json=body).json()["details"]["tokens"]
    output = [token["id"] for token in tokens]
    call = {"max_tokens": len(output), "logprobs": 3, "ignore_eos": True}
    decoded = post(live, COMPLETIONS, prompt=prompt, **call, **sampling)["choices"][0]["logprobs"]
    whole = {"max_tokens": 0, "echo": True, "logprobs": 3}
    echoed = post(live, COMPLETIONS, prompt=prompt + output, **whole)["choices"][0]["logprobs"]
    native = [token["logprob"] for token in tokens]
    assert echoed["token_logprobs"][len(prompt) :] == pytest.approx(native, abs=1e-4)
    assert echoed["token_logprobs"][len(prompt) :] == pytest.approx(decoded["token_logprobs"], abs=1e-4)
    assert echoed["tokens"][len(prompt) :] == decoded["tokens"]
    for one, other in zip(echoed["top_logprobs"][len(prompt) :], decoded["top_logprobs"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_n_choices_draw_with_seeds_of_their_own(tiny_server: LiveServer, path: str) -> None:
    call = ask(path) | {"max_tokens": 16, "ignore_eos": True}

    def texts(**more: object) -> list[str]:
        choices = post(tiny_server, path, **call, **more)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert three == texts(n=3, seed=7)
    assert three == [texts(seed=seed)[0] for seed in (7, 8, 9)]
    assert len(set(texts(n=2, temperature=0))) == 1
    assert len(set(texts(n=3))) == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_n_choices_in_a_stream(tiny_server: LiveServer, path: str) -> None:
    call = ask(path) | {"max_tokens": 16, "n": 3, "seed": 7}
    whole = post(tiny_server, path, **call)["choices"]
    parts = [choice for part in stream(tiny_server, path, **call) for choice in part["choices"]]
    for choice in whole:
        mine = [part for part in parts if part["index"] == choice["index"]]
        *reasons, last = (part["finish_reason"] for part in mine)
        assert set(reasons) == {None}
        assert last == choice["finish_reason"]
        if path == CHAT:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert mine[-1]["delta"] == {}
            assert all(list(part["delta"]) == ["content"] for part in mine[1:-1])
            text = "".join(part["delta"].get("content", "") for part in mine)
            assert text == choice["message"]["content"]
        else:
            assert "".join(part["text"] for part in mine) == choice["text"]


def test_a_prompt_in_its_four_forms(tiny_server: LiveServer) -> None:
    ids, other = list(b"Hello"), list(b"other")
    call = {"max_tokens": 8, "temperature": 0}
    (choice,) = post(tiny_server, COMPLETIONS, prompt="Hello", **call)["choices"]
    for prompt in (["Hello"], ids, [ids]):
        assert post(tiny_server, COMPLETIONS, prompt=prompt, **call)["choices"] == [choice]
    for prompt in (["Hello", "other", "Hello"], [ids, other, ids]):
        answer = post(tiny_server, COMPLETIONS, prompt=prompt, **call)
        first, second, third = answer["choices"]
        assert first == choice
        assert third == choice | {"index": 2}
        assert second["index"] == 1
        assert second["text"] != first["text"]
        assert answer["usage"]["prompt_tokens"] == 15
        assert answer["usage"]["completion_tokens"] == 24


def test_a_character_that_the_prompt_begins_comes_whole(tiny_server: LiveServer) -> None:
    """Only ids can end within a character; some prompt makes the model go on with its second byte."""
    for first in range(256):
        call = {"prompt": [first, 0xC3], "max_tokens": 1, "temperature": 0, "logprobs": 0}
        (choice,) = post(tiny_server, COMPLETIONS, **call)["choices"]
        if "À" <= choice["text"] <= "ÿ":
            assert choice["logprobs"]["tokens"] == ["\ufffd"]
            return
    raise AssertionError("no such prompt")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (". B", "A😎é漢", 13),
        (["😎"], "A", 5),
        ("é漢", "A😎", 10),
        (["C", ". B"], "A😎é漢", 13),
        (["D"], "A😎é漢. BC", 15),
        ("A", "", 1),
        (["BX", "never", "DD", "Q"], TEXT, 16),
        ([], TEXT, 16),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_stop_string_is_cut_off(
    script_server: LiveServer, path: str, stop: str | list[str], text: str, tokens: int
) -> None:
    call = {"messages": MESSAGES} if path == CHAT else {"prompt": "\n"}
    call |= {"max_tokens": 50, "stop": stop}
    answer = post(script_server, path, **call)
    (choice,) = answer["choices"]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == text
    assert choice["finish_reason"] == "stop"
    found = TEXT[len(text) :]  # the rest of the text begins with the stop string that was found
    assert choice["stop_reason"] == (next(s for s in listed(stop) if found.startswith(s)) if found else None)
    assert answer["usage"]["completion_tokens"] == tokens
    parts = [part["choices"][0] for part in stream(script_server, path, **call)]
    assert parts[-1]["stop_reason"] == choice["stop_reason"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    deltas = [part["delta"].get("content", "") if path == CHAT else part["text"] for part in parts]
    assert "".join(deltas) == text


def test_text_that_cannot_begin_a_stop_string_is_not_held_back(script_server: LiveServer) -> None:
    call = {"messages": MESSAGES, "stop": ["é漢!", "BCDX"], "logprobs": True}
    choices = [part["choices"][0] for part in stream(script_server, CHAT, **call)]
    deltas = [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]
    assert deltas == ["A", "😎", "é漢.", " ", "BCD"]


def test_special_tokens_have_no_text(script_server: LiveServer) -> None:
    (choice,) = post(script_server, COMPLETIONS, prompt="u", logprobs=0)["choices"]
    assert choice["text"] == "vw"
    assert choice["logprobs"]["tokens"] == ["<|im_start|>", "v", "<|bos|>", "w", "<|eos|>"]
    (choice,) = post(script_server, COMPLETIONS, prompt=[IM_START], echo=True, max_tokens=1)["choices"]
    assert choice["text"] == "<|im_start|>v"
    call = {"prompt": "8", "ignore_eos": True, "max_tokens": 3, "logprobs": 0}
    (choice,) = post(script_server, COMPLETIONS, **call)["choices"]
    assert choice["logprobs"]["tokens"] == ["<|eos|>"] * 3
    assert choice["text"] == ""
    assert choice["finish_reason"] == "length"


def test_an_empty_text_still_has_its_chunks(script_server: LiveServer) -> None:
    assert post(script_server, COMPLETIONS, prompt="8")["choices"] == [text_chunk("", "stop")]
    (part,) = stream(script_server, COMPLETIONS, prompt="8")
    assert part["choices"] == [text_chunk("", "stop")]
    ids = [*b"hi", EOS]
    (part,) = stream(script_server, COMPLETIONS, prompt=ids)
    assert part["choices"] == [text_chunk("", "stop")]


def test_the_defaults(tiny_server: LiveServer) -> None:
    """16 tokens for a completion, what fits for a chat, and both sampled at temperature 1."""
    answer = post(tiny_server, COMPLETIONS, prompt="Hello", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    long = [{"role": "user", "content": "x" * 470}]
    answer = post(tiny_server, CHAT, messages=long, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 512
    for path in (CHAT, COMPLETIONS):
        call = ask(path) | {"max_tokens": 16}
        answers = [post(tiny_server, path, **call)["choices"][0] for _ in range(3)]
        texts = {a["message"]["content"] if path == CHAT else a["text"] for a in answers}
        assert len(texts) == 3
        hot = post(tiny_server, path, **call, seed=1, temperature=1.0)["choices"]
        assert post(tiny_server, path, **call, seed=1)["choices"] == hot


def test_the_limit_of_a_chat_has_two_names(tiny_server: LiveServer) -> None:
    call = {"messages": MESSAGES, "ignore_eos": True}
    for limits, count in (
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 5}, 5),
    ):
        answer = post(tiny_server, CHAT, **call, **limits)
        assert answer["usage"]["completion_tokens"] == count
        assert answer["choices"][0]["finish_reason"] == "length"


def test_content_parts_are_one_text(tiny_server: LiveServer) -> None:
    call = {"max_tokens": 8, "temperature": 0}
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    whole = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    split = [whole[0], {"role": "user", "content": parts}]
    one, other = (post(tiny_server, CHAT, messages=messages, **call) for messages in (whole, split))
    assert one["choices"] == other["choices"]
    assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


def test_reused_prompt_tokens_are_told(tiny_server: LiveServer) -> None:
    prompt = "a prompt that nobody else in this suite begins with: " + "z" * 43  # 6 blocks of 16
    call = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    first, second = (post(tiny_server, COMPLETIONS, **call) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 80}  # the last token is computed
    assert first["choices"] == second["choices"]


def test_the_models(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        models = client.get("/v1/models").json()
        assert list(models) == ["object", "data"]
        assert models["object"] == "list"
        (card,) = models["data"]
        assert list(card) == ["id", "object", "created", "owned_by", "max_model_len"]
        assert card["id"] == tiny_server.name
        assert card["object"] == "model"
        assert card["max_model_len"] == 512
        assert client.get(f"/v1/models/{tiny_server.name}").json() == card
        unknown = client.get("/v1/models/other")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found(tiny_server: LiveServer, path: str, stream: bool) -> None:
    with tiny_server.client() as client:
        answer = client.post(path, json=ask(path) | {"model": "gpt-unknown", "stream": stream})
        assert answer.status_code == 404
        error = without_id(answer.json(), answer)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            "model",
            "model_not_found",
        )
        assert tiny_server.name in error["message"]
        for named in ({}, {"model": None}, {"model": tiny_server.name}):
            assert client.post(path, json=ask(path) | named | {"max_tokens": 1}).status_code == 200


SEEDS = st.integers(0, 2**64 - 1)
STOPS = st.text(st.characters(max_codepoint=127), min_size=1, max_size=2)
FIELDS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 30), "seed": SEEDS},
    optional={
        "temperature": st.one_of(st.just(0), st.floats(0.1, 2)),
        "top_k": st.integers(-1, 300),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "typical_p": st.floats(0.05, 1),
        "logit_bias": st.dictionaries(st.integers(0, 259).map(str), st.floats(-100, 100), max_size=4),
        "min_tokens": st.integers(0, 1),
        "stop_token_ids": st.lists(st.integers(0, 259), max_size=4),
        "n": st.integers(1, 3),
        "stop": st.one_of(STOPS, st.lists(STOPS, max_size=4)),
        "ignore_eos": st.booleans(),
    },
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None)
@given(fields=FIELDS, prompt=TEXTS, logprobs=st.one_of(st.none(), st.integers(0, 5)))
def test_chat_stream_and_answer_are_equal(
    exact_server: LiveServer, fields: dict[str, Any], prompt: str, logprobs: int | None
) -> None:
    call = fields | {"messages": [{"role": "user", "content": prompt}]}
    if logprobs is not None:
        call |= {"logprobs": True, "top_logprobs": logprobs}
    answer = post(exact_server, CHAT, **call)
    parts = stream(exact_server, CHAT, **call, stream_options={"include_usage": True})
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [parts[-1]["usage"][c] for c in counts] == [answer["usage"][c] for c in counts]
    for choice in answer["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        entries = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert close(entries, (choice["logprobs"] or {"content": []})["content"])
        check_stop(call, choice["message"]["content"])


@settings(max_examples=15, deadline=None)
@given(fields=FIELDS, prompt=TEXTS, logprobs=st.one_of(st.none(), st.integers(0, 5)), echo=st.booleans())
def test_completion_stream_and_answer_are_equal(
    exact_server: LiveServer, fields: dict[str, Any], prompt: str, logprobs: int | None, echo: bool
) -> None:
    call = fields | {"prompt": prompt, "logprobs": logprobs, "echo": echo}
    answer = post(exact_server, COMPLETIONS, **call)
    parts = stream(exact_server, COMPLETIONS, **call)
    for choice in answer["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        if logprobs is None:
            assert choice["logprobs"] is None
            assert all(c["logprobs"] is None for c in mine)
        else:
            for name, values in choice["logprobs"].items():
                assert close([v for c in mine if c["logprobs"] for v in c["logprobs"][name]], values)
        if echo:
            assert choice["text"].startswith(prompt)
        check_stop(call, choice["text"][len(prompt) if echo else 0 :])


def listed(stop: str | list[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else stop


def check_stop(call: dict[str, Any], text: str) -> None:
    """No stop string shows in a text."""
    assert not any(stop in text for stop in listed(call.get("stop") or []))


def test_tokens_are_counted(tiny_server: LiveServer) -> None:
    before = metric(tiny_server, "generated_tokens_total")
    post(tiny_server, COMPLETIONS, prompt=["a", "b"], n=2, max_tokens=5, ignore_eos=True)
    assert metric(tiny_server, "generated_tokens_total") == before + 20


def test_a_chunk_is_compact_json_in_one_line(script_server: LiveServer) -> None:
    for prompt, text in (("1", "\r2\u20283"), ("4", "\x855"), ("6", '"7\\8')):
        with script_server.client() as client:
            answer = client.post(COMPLETIONS, json={"prompt": prompt, "stream": True})
        assert "".join(part["choices"][0]["text"] for part in chunks(answer.text)) == text
        for payload in payloads(answer.text)[:-1]:
            assert len(payload.splitlines()) == 1
            assert len(payload) <= len(json.dumps(json.loads(payload), separators=(",", ":")))
