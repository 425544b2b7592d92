"""Real clients that need a venv of their own, or node, against a live server; clients/ has their scripts."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import openai
import pytest
from live import LiveServer
from test_clients import ODD, TEXT
from venvs import npm, run, venv

CLIENTS = Path(__file__).with_name("clients")
INSTALL = pytest.mark.timeout(600)  # the first run on a machine


@INSTALL
def test_text_generation(script_server: LiveServer) -> None:
    client = venv("text-generation", "text-generation==0.7.0")
    client.run(CLIENTS / "tgi_client.py", script_server.url, TEXT)


@INSTALL
def test_litellm(script_server: LiveServer) -> None:
    client = venv("litellm", "litellm[mcp]==1.106.2")  # it imports mcp for any call with tools
    client.run(CLIENTS / "litellm_client.py", script_server.url, script_server.name, TEXT)


@INSTALL
def test_langchain(serve: Callable[..., LiveServer], smollm2_path: Path) -> None:
    """LangChain's own tests of a chat model."""
    client = venv("langchain", "langchain-tests==1.1.9", "langchain-openai==1.7.3")
    server = serve(smollm2_path, served_model_aliases="other")
    environment = {"SERVER": server.url, "MODEL": server.name, "ALIAS": "other"}
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--noconftest", "-q", "-o", "asyncio_mode=auto"]
    options += ["-o", "asyncio_default_test_loop_scope=session"]  # LangChain keeps one client for all loops
    client.run("-m", "pytest", *options, CLIENTS / "langchain_chat.py", environment=environment)


@INSTALL
def test_lm_eval_scores_as_transformers_does(
    serve: Callable[..., LiveServer], tiny_folder: Path, tmp_path: Path
) -> None:
    client = venv("lm-eval", "lm-eval[api]==0.4.13", with_project=True)
    server = serve(tiny_folder, dtype="float32", kernels="torch")
    said = client.run(CLIENTS / "lm_eval_logprobs.py", server.url, server.name, tiny_folder, tmp_path)
    ours, theirs = map(json.loads(said.splitlines()[-1]).get, ("server", "reference"))
    assert len(ours) == len(theirs) == 4
    for document, reference in zip(ours, theirs, strict=True):
        for (score, greedy), (expected, is_greedy) in zip(document, reference, strict=True):
            assert score == pytest.approx(expected, abs=1e-3)
            assert greedy == is_greedy


# Three parsers of server-sent events


STREAMS = {
    "/generate_stream": lambda prompt: {"inputs": prompt, "parameters": {"details": True}},
    "/v1/completions": lambda prompt: {"prompt": prompt, "stream": True, "max_tokens": 30, "logprobs": 1},
    "/v1/chat/completions": lambda prompt: {
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}


def with_httpx_sse(url: str, path: str, bodies: list[dict[str, Any]]) -> list[list[Any]]:
    streams = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for body in bodies:
            with httpx_sse.connect_sse(client, "POST", path, json=body) as source:
                events = list(source.iter_sse())
            assert all(event.event == "message" and not event.id for event in events)
            streams.append([event.data for event in events])
    return streams


def with_eventsource_parser(url: str, path: str, bodies: list[dict[str, Any]]) -> list[list[Any]]:
    module = npm("eventsource-parser", "eventsource-parser@3.0.6")
    file = module / "node_modules/eventsource-parser/dist/stream.js"
    streams = json.loads(
        run(["node", str(CLIENTS / "read_events.mjs"), str(file), url + path, json.dumps(bodies)])
    )
    assert all(event["event"] == "message" and not event["id"] for events in streams for event in events)
    return [[event["data"] for event in events] for events in streams]


def with_openai(url: str, path: str, bodies: list[dict[str, Any]]) -> list[list[Any]]:
    streams = openai.Stream[object]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return [
            list(client.post(path, body=body, cast_to=object, stream=True, stream_cls=streams))
            for body in bodies
        ]


def comparable(events: Iterable[Any]) -> list[Any]:
    """The events without what differs from call to call, and without the end that openai keeps to itself."""
    read = [json.loads(event) if isinstance(event, str) else event for event in events if event != "[DONE]"]
    return [{key: value for key, value in event.items() if key not in ("id", "created")} for event in read]


@INSTALL
@pytest.mark.parametrize("path", STREAMS)
def test_parsers_of_events_agree(serve: Callable[..., LiveServer], script_folder: Path, path: str) -> None:
    # Without a prefix cache: usage would tell the second caller of its hits.
    server = serve(script_folder, dtype="float32", prefix_cache=False)
    bodies = [STREAMS[path](prompt) for prompt in ("9", *ODD)]
    read = with_httpx_sse(server.url, path, bodies)
    for events, text in zip(read, (TEXT, *ODD.values()), strict=True):
        assert (events[-1] == "[DONE]") == path.startswith("/v1")
        assert len(events) > len(text), "it did not come token by token"
    read = [comparable(events) for events in read]
    for others in (with_eventsource_parser, with_openai):
        assert [comparable(events) for events in others(server.url, path, bodies)] == read
