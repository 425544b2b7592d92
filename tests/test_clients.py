"""Real clients against a live server: the openai SDK, huggingface_hub's InferenceClient, httpx-sse."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import httpx_sse
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    GenerationError,
    HfHubHTTPError,
    OverloadedError,
    ValidationError,
)
from live import LiveServer
from openai.types.chat import ChatCompletionMessageParam
from wire import FORMS, Background, wait_for

TEXT = "\nA😎é漢. BCD"
"""What the script model says after "9"; after a chat template it says the same without the line end."""
ODD = {"1": "\r2\u20283", "4": "\x855", "6": '"7\\8', "x": "\ufffd", "8": ""}
"""Prompts of the script model whose answers break parsers that are not careful."""
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def sdk(script_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=script_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def hub(script_server: LiveServer) -> InferenceClient:
    return InferenceClient(model=script_server.url)


# The openai SDK


def test_openai_lists_the_model(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    assert [model.id for model in sdk.models.list()] == [script_server.name]
    assert sdk.models.retrieve(script_server.name).object == "model"


def test_openai_chat(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    answer = sdk.chat.completions.create(
        model=script_server.name, messages=HELLO, temperature=0, logprobs=True, top_logprobs=1
    )
    (choice,) = answer.choices
    assert choice.message.content == TEXT.strip()
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    said = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
    assert said.decode() == TEXT.strip() + "<|eos|>"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(choice.logprobs.content)


def test_openai_chat_stream(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    stream = sdk.chat.completions.create(
        model=script_server.name,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        stop=["BC"],
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A😎é漢. "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_openai_stream_helper(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    """The SDK's own accumulator puts the chunks together to what the answer says."""
    with sdk.chat.completions.stream(model=script_server.name, messages=HELLO, n=2) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == [TEXT.strip()] * 2
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 2


@pytest.mark.parametrize("prompt", ["9", *ODD])
def test_openai_completions(sdk: openai.OpenAI, script_server: LiveServer, prompt: str) -> None:
    text = (ODD | {"9": TEXT})[prompt]
    answer = sdk.completions.create(model=script_server.name, prompt=prompt, max_tokens=30)
    assert answer.choices[0].text == text
    stream = sdk.completions.create(model=script_server.name, prompt=prompt, max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_openai_errors(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-unknown", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model=script_server.name, messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model=script_server.name, prompt="x" * 600, stream=True)
    assert bad.value.code == "context_length_exceeded"


def test_openai_without_a_stream_left_open(sdk: openai.OpenAI, script_server: LiveServer) -> None:
    body = {"ignore_eos": True}
    with sdk.completions.create(
        model=script_server.name, prompt="9", max_tokens=400, stream=True, extra_body=body
    ) as stream:
        next(iter(stream))
    script_server.wait_until_idle(1)


def test_openai_async(script_server: LiveServer) -> None:
    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=script_server.url + "/v1", api_key="none") as client:
            answer = await client.chat.completions.create(model=script_server.name, messages=HELLO)
            assert answer.choices[0].message.content == TEXT.strip()
            stream = await client.chat.completions.create(
                model=script_server.name, messages=HELLO, stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == TEXT.strip()

            async def one(prompt: str) -> str:
                chunks = await client.completions.create(
                    model=script_server.name, prompt=prompt, max_tokens=30, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            assert await asyncio.gather(*map(one, ODD)) == list(ODD.values())

    asyncio.run(talk())


# huggingface_hub


@pytest.mark.parametrize("prompt", ["9", *ODD])
def test_hub_text_generation(hub: InferenceClient, prompt: str) -> None:
    text = (ODD | {"9": TEXT})[prompt]
    assert hub.text_generation(prompt, return_full_text=False) == text
    assert hub.text_generation(prompt) == prompt + text  # as a TGI server does
    pieces = list(hub.text_generation(prompt, stream=True))
    if prompt != "x":  # there the cut character comes together with EOS
        assert "".join(pieces) == text + "<|eos|>"


def test_hub_text_generation_details(hub: InferenceClient) -> None:
    answer = hub.text_generation(
        "B9",
        details=True,
        decoder_input_details=True,
        return_full_text=False,
        max_new_tokens=12,
        top_n_tokens=2,
        stop=["漢"],
    )
    assert answer.generated_text == "\nA😎é漢"
    details = answer.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("stop_sequence", 11, None)
    assert [token.id for token in details.prefill] == list(b"B9")
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert details.top_tokens is not None
    assert [len(top) for top in details.top_tokens] == [2] * 11


def test_hub_text_generation_stream_details(hub: InferenceClient) -> None:
    *events, last = hub.text_generation(
        "9", stream=True, details=True, do_sample=True, seed=3, return_full_text=False
    )
    assert [event.index for event in events] == list(range(1, 17))
    assert all(event.generated_text is None and event.details is None for event in events)
    assert last.generated_text == TEXT
    assert last.token.special
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("eos_token", 17)
    assert (last.details.input_length, last.details.seed) == (1, 3)


def test_hub_chat(hub: InferenceClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = hub.chat_completion(messages, max_tokens=30, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == TEXT.strip()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.usage.completion_tokens == 16
    stream = hub.chat_completion(messages, max_tokens=30, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT.strip()
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == 16


def test_hub_chat_by_the_models_name(script_server: LiveServer) -> None:
    client = InferenceClient(base_url=script_server.url, api_key="none")
    for address in (script_server.url, script_server.url + "/v1"):
        client = InferenceClient(base_url=address)
        answer = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == TEXT.strip()
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": "hi"}], model=script_server.name
        )
        assert answer.model == script_server.name
    with pytest.raises(HfHubHTTPError):
        client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], model="other")


def test_hub_async(script_server: LiveServer) -> None:
    async def talk() -> None:
        client = AsyncInferenceClient(model=script_server.url)
        assert await client.text_generation("9", return_full_text=False) == TEXT
        stream = await client.text_generation("9", stream=True)
        assert "".join([piece async for piece in stream]) == TEXT + "<|eos|>"
        chat = await client.chat_completion([{"role": "user", "content": "hi"}], stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chat]) == TEXT.strip()

    asyncio.run(talk())


def test_hub_errors_have_their_classes(
    hub: InferenceClient,
    script_server: LiveServer,
    serve: Callable[..., LiveServer],
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream in (False, True):
        with pytest.raises(ValidationError, match="`max_new_tokens` must be strictly positive"):
            list(hub.text_generation("9", max_new_tokens=0, stream=stream))
    full = serve(tiny_folder, dtype="float32", max_running=1, max_waiting=0)
    full.wait_until_idle()
    busy = Background(full, FORMS[0], FORMS[0].body("busy", 300))
    wait_for(lambda: full.stats.running == 1)
    with pytest.raises(OverloadedError):
        InferenceClient(model=full.url).text_generation("9", max_new_tokens=1)
    assert busy.answer().status_code == 200

    runner = script_server.service.engine._runner
    execute = runner.execute

    def failing(batch: object) -> object:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("once")

    for stream in (False, True):
        monkeypatch.setattr(runner, "execute", failing)
        with pytest.raises(GenerationError):
            list(hub.text_generation("9", stream=stream))
    assert hub.text_generation("9", return_full_text=False) == TEXT


# Plain server-sent events


@pytest.mark.parametrize("prompt", ["9", *ODD])
def test_httpx_sse(script_server: LiveServer, prompt: str) -> None:
    text = (ODD | {"9": TEXT})[prompt]
    with httpx.Client(base_url=script_server.url) as client:
        body = {"inputs": prompt, "parameters": {}}
        with httpx_sse.connect_sse(client, "POST", "/generate_stream", json=body) as source:
            events = list(source.iter_sse())
        assert all(event.event == "message" and not event.id for event in events)
        assert events[-1].json()["generated_text"] == text
        call = {"prompt": prompt, "stream": True, "max_tokens": 30}
        with httpx_sse.connect_sse(client, "POST", "/v1/completions", json=call) as source:
            *chunks, done = source.iter_sse()
        assert done.data == "[DONE]"
        assert "".join(chunk.json()["choices"][0]["text"] for chunk in chunks) == text


@pytest.mark.parametrize("prompt", ["9", *ODD])
def test_naive_readers_of_lines(script_server: LiveServer, prompt: str) -> None:
    """Such as httpx.iter_lines, which ends lines at U+2028 and its like too; each line is still whole."""
    text = (ODD | {"9": TEXT})[prompt]
    call = {"prompt": prompt, "stream": True, "max_tokens": 30}
    with script_server.client() as client, client.stream("POST", "/v1/completions", json=call) as answer:
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in data) == text


# The real model, as people will use it


def test_the_real_model_answers_a_chat(smollm2_server: LiveServer) -> None:
    question: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "Name the largest ocean on Earth."}
    ]
    with openai.OpenAI(base_url=smollm2_server.url + "/v1", api_key="none") as client:
        call = {"model": smollm2_server.name, "messages": question, "temperature": 0, "max_tokens": 24}
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**call, stream=True)  # type: ignore[call-overload]
        ]
    text = "".join(pieces)
    assert "Pacific" in text
    assert "ocean" in text
    assert "<|" not in text
    assert "\ufffd" not in text
    assert len(pieces) > 5, "it did not come token by token"
    hub = InferenceClient(model=smollm2_server.url)
    answer = hub.chat_completion(list(question), temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == text
