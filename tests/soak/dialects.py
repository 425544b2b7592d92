"""Each dialect as the soak speaks it: a call's body, and the whole answer read strictly.

An answer or an event that is not as promised is Wrong; an error within a stream is Failed.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from soak.fates import Wrong

Body = dict[str, Any]


class Failed(Exception):
    """The server said in a stream that the model failed."""


@dataclass(frozen=True, slots=True)
class Text:
    """One choice."""

    text: str
    cut: bool
    """Whether the limit of tokens ended it."""


class Dialect(Protocol):
    """One wire format."""

    name: str

    def path(self, stream: bool) -> str:
        """Where to post."""

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        """A call without extras."""

    def read(self, data: Any) -> list[Text]:
        """A whole answer."""

    def read_events(self, payloads: list[str]) -> list[Text]:
        """All events of a stream, to their end (Failed)."""


def data_lines(body: str) -> list[str]:
    """What the events of a stream say; the last one must be whole (Wrong)."""
    if not body.endswith("\n\n"):
        raise Wrong(f"a stream ends within an event: ...{body[-80:]!r}")
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


class Native:
    """TGI's /generate and /generate_stream."""

    name = "generate"

    def path(self, stream: bool) -> str:
        return "/generate_stream" if stream else "/generate"

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        parameters = {"max_new_tokens": tokens, "details": True, "do_sample": False}
        return {"inputs": prompt, "parameters": parameters}

    def read(self, data: Any) -> list[Text]:
        return [Text(data["generated_text"], data["details"]["finish_reason"] == "length")]

    def read_events(self, payloads: list[str]) -> list[Text]:
        events = [json.loads(payload) for payload in payloads]
        if "error" in events[-1]:
            raise Failed(events[-1]["error"])
        if any(event["generated_text"] is not None for event in events[:-1]):
            raise Wrong("an event before the last has the whole text")
        return self.read(events[-1])


class OpenAI(ABC):
    """What OpenAI's completions and chat share."""

    def read_events(self, payloads: list[str]) -> list[Text]:
        *chunks, done = payloads
        if done != "[DONE]":
            raise Wrong(f"a stream on /v1 ends with {done[:80]!r}")
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        for chunk in map(json.loads, chunks):
            if "error" in chunk:
                raise Failed(chunk["error"]["message"])
            for choice in chunk["choices"]:
                place = choice["index"]
                texts[place] = texts.get(place, "") + self.delta(choice)
                if choice["finish_reason"] is not None:
                    reasons[place] = choice["finish_reason"]
        if texts.keys() != reasons.keys():
            raise Wrong("a choice has no finish_reason")
        return [Text(texts[place], reasons[place] == "length") for place in sorted(texts)]

    @abstractmethod
    def delta(self, choice: Any) -> str:
        """What a chunk adds."""


class Completions(OpenAI):
    """/v1/completions."""

    name = "completions"

    def path(self, stream: bool) -> str:
        return "/v1/completions"

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}

    def read(self, data: Any) -> list[Text]:
        return [Text(choice["text"], choice["finish_reason"] == "length") for choice in data["choices"]]

    def delta(self, choice: Any) -> str:
        return str(choice["text"])


class Chat(OpenAI):
    """/v1/chat/completions."""

    name = "chat"

    def path(self, stream: bool) -> str:
        return "/v1/chat/completions"

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        messages = [{"role": "user", "content": prompt}]
        more = {"max_tokens": tokens, "temperature": 0, "stream": stream}
        return {"model": model, "messages": messages} | more

    def read(self, data: Any) -> list[Text]:
        return [
            Text(self._say(choice["message"]), choice["finish_reason"] == "length")
            for choice in data["choices"]
        ]

    def delta(self, choice: Any) -> str:
        return self._say(choice["delta"])

    def _say(self, message: Any) -> str:
        calls = message.get("tool_calls") or []
        return (message.get("content") or "") + "".join(call["function"]["arguments"] for call in calls)


class Responses:
    """/v1/responses."""

    name = "responses"

    def path(self, stream: bool) -> str:
        return "/v1/responses"

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        return {
            "model": model,
            "input": prompt,
            "max_output_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }

    def read(self, data: Any) -> list[Text]:
        if data["status"] not in ("completed", "incomplete"):
            raise Wrong(f"an answer of /v1/responses is {data['status']}")
        parts = [
            item["arguments"]
            if item["type"] == "function_call"
            else "".join(part["text"] for part in item["content"])
            for item in data["output"]
        ]
        return [Text("".join(parts), data["status"] == "incomplete")]

    def read_events(self, payloads: list[str]) -> list[Text]:
        events = [json.loads(payload) for payload in payloads]
        if [event["sequence_number"] for event in events] != list(range(len(events))):
            raise Wrong("the events of /v1/responses are not numbered in order")
        if events[-1]["type"] == "response.failed":
            raise Failed(events[-1]["response"]["error"]["message"])
        return self.read(events[-1]["response"])


class Messages:
    """/v1/messages."""

    name = "messages"

    def path(self, stream: bool) -> str:
        return "/v1/messages"

    def body(self, model: str, prompt: str, tokens: int, stream: bool) -> Body:
        messages = [{"role": "user", "content": prompt}]
        more = {"max_tokens": tokens, "temperature": 0, "stream": stream}
        return {"model": model, "messages": messages} | more

    def read(self, data: Any) -> list[Text]:
        parts = [
            json.dumps(block["input"]) if block["type"] == "tool_use" else block["text"]
            for block in data["content"]
        ]
        return [Text("".join(parts), data["stop_reason"] == "max_tokens")]

    def read_events(self, payloads: list[str]) -> list[Text]:
        events = [json.loads(payload) for payload in payloads]
        if events[-1]["type"] == "error":
            raise Failed(events[-1]["error"]["message"])
        if events[-1]["type"] != "message_stop":
            raise Wrong(f"a stream of /v1/messages ends with {events[-1]['type']}")
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        text = "".join(delta.get("text") or delta.get("partial_json") or "" for delta in deltas)
        reasons = [event["delta"]["stop_reason"] for event in events if event["type"] == "message_delta"]
        return [Text(text, reasons == ["max_tokens"])]


DIALECTS: tuple[Dialect, ...] = (Native(), Completions(), Chat(), Responses(), Messages())
