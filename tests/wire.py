"""What the tests say to a live server and read from it: each form of call, strict events, raw sockets."""

import asyncio
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from checkpoints import EOS, VOCAB_SIZE, byte_tokenizer, make_llama
from live import LiveServer

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Form:
    """One way to ask for a text."""

    path: str
    stream: bool

    def __str__(self) -> str:
        return f"{self.path} {'stream' if self.stream else 'answer'}"

    @property
    def is_openai(self) -> bool:
        return self.path.startswith("/v1")

    def body(self, prompt: str, max_tokens: int, **more: object) -> dict[str, Any]:
        """A greedy call that runs to `max_tokens`, whatever the model says."""
        if not self.is_openai:
            parameters = {"max_new_tokens": max_tokens, "ignore_eos": True, "return_full_text": False}
            body = {"inputs": prompt, "parameters": parameters | more}
            return body | {"stream": self.stream} if self.path == "/" else body
        body = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": self.stream} | more
        if self.path == "/v1/responses":
            body["max_output_tokens"] = body.pop("max_tokens")
            return body | {"input": prompt}
        if self.path in ("/v1/chat/completions", "/v1/messages"):
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}

    def text(self, answer: httpx.Response) -> str:
        """The whole text of an answer, however it came."""
        assert answer.status_code == 200, answer.text
        if not self.is_openai:
            if self.stream:
                return str(native_events(answer.text)[-1]["generated_text"])
            data = answer.json()
            return str((data[0] if self.path == "/" else data)["generated_text"])
        if self.path in ("/v1/responses", "/v1/messages"):
            data = typed_events(answer.text) if self.stream else [answer.json()]
            return self._typed_text(data)
        if self.stream:
            choices = [choice for chunk in chunks(answer.text) for choice in chunk["choices"]]
            return "".join(
                choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices
            )
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    def _typed_text(self, data: list[dict[str, Any]]) -> str:
        """Of the dialects of items and blocks: an answer alone, or all events of a stream."""
        if self.path == "/v1/responses":
            response = data[-1]["response"] if self.stream else data[-1]
            return "".join(part["text"] for item in response["output"] for part in item["content"])
        if self.stream:
            return "".join(event["delta"].get("text", "") for event in data if "delta" in event)
        return "".join(block["text"] for block in data[-1]["content"])


FORMS = (
    Form("/generate", False),
    Form("/generate_stream", True),
    Form("/", False),
    Form("/", True),
    Form("/v1/completions", False),
    Form("/v1/completions", True),
    Form("/v1/chat/completions", False),
    Form("/v1/chat/completions", True),
)
"""TGI's, and those of OpenAI's with choices."""
ALL_FORMS = (
    *FORMS,
    Form("/v1/responses", False),
    Form("/v1/responses", True),
    Form("/v1/messages", False),
    Form("/v1/messages", True),
)


def payloads(body: str) -> list[str]:
    """The data of a stream's events, whose framing must be `data: `, one line and a blank line."""
    events = body.split("\n\n")
    assert events.pop() == "", "the last event is not complete"
    for event in events:
        assert event.startswith("data: ") and not event.startswith("data:  ")
        assert "\n" not in event and "\r" not in event
    return [event.removeprefix("data: ") for event in events]


def native_events(body: str) -> list[dict[str, Any]]:
    """The events of a native stream."""
    return [json.loads(payload) for payload in payloads(body)]


def chunks(body: str) -> list[dict[str, Any]]:
    """The chunks of a stream on /v1, which must end with [DONE]."""
    *data, done = payloads(body)
    assert done == "[DONE]"
    return [json.loads(payload) for payload in data]


def typed_events(body: str) -> list[dict[str, Any]]:
    """The events of a stream whose events have names, which must be those of their types."""
    events = body.split("\n\n")
    assert events.pop() == "", "the last event is not complete"
    data = []
    for event in events:
        name, payload = event.split("\n")
        data.append(json.loads(payload.removeprefix("data: ")))
        assert name == f"event: {data[-1]['type']}" and payload.startswith("data: ")
    return data


def without_id(error: dict[str, Any], answer: httpx.Response) -> dict[str, Any]:
    """An error's body without the request's id, which must be the one that the header has."""
    holder = error["error"] if list(error) == ["error"] else error  # OpenAI's; native and Anthropic's
    assert holder.pop("request_id") == answer.headers["x-request-id"]
    return error


class RawCall:
    """A call on a socket of its own, for clients that leave at any point."""

    def __init__(
        self,
        server: LiveServer,
        form: Form,
        body: dict[str, Any],
        *,
        receive_buffer: int | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.received = b""
        self.socket = socket.socket()
        self.socket.settimeout(30)
        self.socket.bind((address, 0))
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(self.message(form, body))

    @staticmethod
    def message(form: Form, body: dict[str, Any]) -> bytes:
        """A whole request as it goes over the wire."""
        content = json.dumps(body).encode()
        head = f"POST {form.path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def read_events(self, count: int) -> None:
        """Read until so many events came."""
        while self.received.count(b"data: ") < count:
            data = self.socket.recv(4096)
            assert data, self.received
            self.received += data

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, politely or with RST."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Background:
    """A call in a thread, while the test does something else."""

    def __init__(self, server: LiveServer, form: Form, body: dict[str, Any]) -> None:
        self._answer: httpx.Response | None = None
        self._form = form

        def call() -> None:
            with server.client() as client:
                self._answer = client.post(form.path, json=body)

        self._thread = threading.Thread(target=call)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def answer(self) -> httpx.Response:
        self._thread.join(60)
        assert self._answer is not None
        return self._answer

    def text(self) -> str:
        return self._form.text(self.answer())


def close(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Whether two JSON values are equal but for what the shape of a step does to a logarithm."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(close(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until something is so (AssertionError if it never is)."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def metric(server: LiveServer, name: str, **labels: str) -> float:
    """A metric's present value."""
    return server.service.metrics.registry.get_sample_value(f"rivulet_{name}", labels) or 0.0


def num_tasks(server: LiveServer) -> int:
    """Tasks on the server's event loop, this question aside."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    loop = server.service.engine._loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(count(), loop).result(10)


def script_llama(folder: Path, *scripts: bytes | tuple[int, ...]) -> None:
    """Save a model that knows one successor of each token: those of the scripts, which may share no token.

    A real Llama whose blocks add nothing: a token's embedding is its own direction, from which the head
    reads the next token. Whatever has no successor in a script is followed by EOS.
    """
    successors = dict.fromkeys(range(VOCAB_SIZE), EOS)
    for script in scripts:
        assert len(set(script)) == len(script)
        for token, successor in itertools.pairwise(script):
            assert successors[token] == EOS
            successors[token] = successor
    byte_tokenizer(folder)
    model = make_llama(folder, tie=False, layers=1, hidden_size=272, intermediate_size=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for token, successor in successors.items():
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[successor, token] = 3.0
    model.save_pretrained(folder)
