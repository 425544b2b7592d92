"""What the server says of its own API: /openapi.json, /docs and docs/api.md are true and complete."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from live import LiveServer
from wire import payloads

from server.routes.chat import ChatRequest
from server.routes.completions import CompletionRequest
from server.routes.openai_fields import SamplingFields, StreamOptions
from server.routes.structured import StructuredOutputs
from server.routes.tgi_schema import GenerateRequest, Parameters

API = (Path(__file__).resolve().parents[1] / "docs/api.md").read_text()
SHARED, COMPLETIONS, CHAT, TGI = (
    API.partition(f"\n{heading}")[2].partition("\n##")[0]
    for heading in (
        "## `POST /v1/completions` and",
        "### Of `/v1/completions`",
        "### Of `/v1/chat/completions`",
        "## `POST /generate`",
    )
)
OWN = {name for body in (CompletionRequest, ChatRequest) for name in body.__annotations__}
SECTIONS: list[tuple[str, set[str]]] = [
    (SHARED, SamplingFields.model_fields.keys() - OWN),
    (SHARED, set(StreamOptions.model_fields)),
    (SHARED, {field.alias or name for name, field in StructuredOutputs.model_fields.items()}),
    (COMPLETIONS, CompletionRequest.__annotations__.keys() - {"NEUTRAL"}),
    (CHAT, ChatRequest.__annotations__.keys() - {"NEUTRAL"}),
    (TGI, set(GenerateRequest.model_fields) | set(Parameters.model_fields)),
]


@pytest.mark.parametrize(("section", "fields"), SECTIONS, ids=range(len(SECTIONS)))
def test_every_field_stands_in_the_documentation(section: str, fields: set[str]) -> None:
    assert fields <= set(re.findall("`([a-z_]+)`", section))


def test_the_documentation_has_no_other_fields() -> None:
    rows = {
        name for section in (SHARED, COMPLETIONS, CHAT) for name in re.findall("^\\| `(\\w+)`", section, re.M)
    }
    assert rows <= CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    native = set(re.findall("^\\| `(\\w+)`", TGI, re.M))
    assert native == {*GenerateRequest.model_fields, *Parameters.model_fields, "stream"}


@pytest.fixture(scope="module")
def document(tiny_server: LiveServer) -> dict[str, Any]:
    with tiny_server.client() as client:
        return dict(client.get("/openapi.json").json())


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(p, method, o) for p, all in document["paths"].items() for method, o in all.items()]


def test_every_operation_tells_its_answers(document: dict[str, Any]) -> None:
    """No empty schema stands for an answer, and no error is FastAPI's own."""
    assert len(operations(document)) > 10
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            for media, content in response.get("content", {}).items():
                assert content.get("schema"), (method, path, status, media)
        if "requestBody" in operation:
            invalid = "400" if path.startswith("/v1") else "422"
            assert {invalid, "413"} <= operation["responses"].keys(), path
            assert (invalid == "422") == ("422" in operation["responses"]), path
    assert "HTTPValidationError" not in str(document)


def test_every_path_is_served(tiny_server: LiveServer, document: dict[str, Any]) -> None:
    with tiny_server.client() as client:
        for path, method, operation in operations(document):
            answer = client.request(method, path.replace("{name}", tiny_server.name))
            assert answer.status_code not in (404, 405), path
            if "requestBody" in operation:  # an empty body is none
                check(document, operation, answer)


def check(document: dict[str, Any], operation: dict[str, Any], answer: Any) -> None:
    """Hold an answer, or each event of a stream, to what is described."""
    content = operation["responses"][str(answer.status_code)]["content"]
    media = answer.headers["content-type"].partition(";")[0]
    schema = content[media]["schema"] | {"components": document["components"]}
    if media == "text/event-stream":
        validator = Draft202012Validator(schema["contentSchema"])
        for payload in payloads(answer.text):
            if payload != "[DONE]":
                validator.validate(json.loads(payload))
    else:
        Draft202012Validator(schema).validate(answer.json())


MESSAGES = [{"role": "user", "content": "a"}]
CALLS: list[tuple[str, dict[str, Any], int]] = [
    (
        "/generate",
        {"inputs": "a", "parameters": {"max_new_tokens": 3, "details": True, "top_n_tokens": 2}},
        200,
    ),
    ("/generate", {"inputs": "", "parameters": {}}, 422),
    ("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 3, "details": True}}, 200),
    ("/", {"inputs": "a", "parameters": {"max_new_tokens": 3}}, 200),
    ("/", {"inputs": "a", "parameters": {"max_new_tokens": 3}, "stream": True}, 200),
    ("/v1/completions", {"prompt": "a", "logprobs": 2, "echo": True}, 200),
    ("/v1/completions", {"prompt": "a", "logprobs": 2, "stream": True}, 200),
    ("/v1/completions", {"prompt": ""}, 400),
    ("/v1/completions", {"prompt": "a", "model": "x"}, 404),
    ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "max_tokens": 3}, 200),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        200,
    ),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/tokenize", {"inputs": "a"}, 200),
    ("/tokenize", {"prompt": "a"}, 200),
    ("/tokenize", {}, 422),
    ("/chat_tokenize", {"messages": MESSAGES}, 200),
    ("/detokenize", {"tokens": [65]}, 200),
]


@pytest.mark.parametrize(("path", "body", "status"), CALLS, ids=lambda value: str(value)[:60])
def test_an_answer_is_as_described(
    tiny_server: LiveServer, document: dict[str, Any], path: str, body: dict[str, Any], status: int
) -> None:
    with tiny_server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    check(document, document["paths"][path]["post"], answer)


def test_a_large_body_is_refused_as_described(tiny_server: LiveServer, document: dict[str, Any]) -> None:
    for path in ("/generate", "/v1/completions"):
        with tiny_server.client() as client:
            answer = client.post(path, json={"prompt": "x" * 2_000_000})
        assert answer.status_code == 413
        check(document, document["paths"][path]["post"], answer)


def test_bounds_are_told(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        temperature = schemas[name]["properties"]["temperature"]["anyOf"][0]
        assert temperature == {"type": "number", "minimum": 0, "maximum": 2}
    assert schemas["Parameters"]["properties"]["frequency_penalty"]["minimum"] == -2


def test_the_page_needs_no_network(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        page = client.get("/docs")
        assert client.get("/redoc").status_code == 404
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search("https?://|//[a-z]|@import|url\\(", page.text)
    assert 'fetch("openapi.json")' in page.text
