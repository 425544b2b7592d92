"""What is asked of the server rather than of the model: health, info, metrics, tokens and text."""

import asyncio
import re
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BOS, EOS, IM_END, IM_START
from live import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from wire import FORMS, RawCall, metric, wait_for

from server.routes.tgi_answers import ChatTokens, DetokenizedText, Info, Tokens

DESCRIBED = {"/tokenize": Tokens, "/chat_tokenize": ChatTokens, "/detokenize": DetokenizedText}
"""Path -> what /openapi.json says of its answer."""


def post(server: LiveServer, path: str, body: dict[str, Any]) -> Any:
    with server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if path in DESCRIBED:
        DESCRIBED[path].model_validate_json(answer.content)
    return answer.json()


def test_health_and_readiness(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        for path in ("/health", "/ping", "/"):
            health = client.get(path)
            assert (health.status_code, health.content) == (200, b""), path
        assert client.head("/health").status_code in (200, 405)
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


def test_info(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        info = client.get("/info").json()
    Info.model_validate(info)
    assert 1 <= info.pop("validation_workers") <= 32
    assert info == {
        "model_id": tiny_server.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 64 + 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 511,
        "max_total_tokens": 512,
        "max_client_batch_size": 64,
        "router": "rivulet",
        "version": version("rivulet"),
        "sha": None,
        "docker_label": None,
        "max_top_n_tokens": 5,
        "model_dtype": "float32",
        "model_device_type": "cpu",
        "kernels": "torch",
        "kv_cache_tokens": 16384,
        "logprobs": "of the model's own distribution, before penalties, temperature and cuts",
    }


def test_the_limits_that_are_told_hold(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        info = client.get("/info").json()
        most = "x" * info["max_input_tokens"]
        assert client.post("/generate", json={"inputs": most}).status_code == 200
        assert client.post("/generate", json={"inputs": most + "x"}).status_code == 422
        for field, limit, value in (
            ("stop", info["max_stop_sequences"], lambda n: ["no"] * n),
            ("top_n_tokens", info["max_top_n_tokens"], lambda n: n),
            ("best_of", info["max_best_of"], lambda n: n),
        ):
            for more, status in ((0, 200), (1, 422)):
                parameters = {field: value(limit + more), "max_new_tokens": 1, "do_sample": True}
                answer = client.post("/generate", json={"inputs": "a", "parameters": parameters})
                assert answer.status_code == status
        for more, status in ((0, 200), (1, 400)):
            prompts = ["a"] * (info["max_client_batch_size"] + more)
            answer = client.post("/v1/completions", json={"prompt": prompts, "max_tokens": 1})
            assert answer.status_code == status


def test_metrics_are_prometheus_text(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for name in (
        *("requests", "rejections", "generated_tokens", "prompt_tokens", "output_tokens", "request_seconds"),
        *("time_to_first_token_seconds", "inter_token_seconds", "step_seconds", "step_rows"),
        *("step_sequences", "requests_running", "requests_waiting", "cache_blocks_used"),
        "cache_blocks_total",
    ):
        assert f"rivulet_{name}" in families, name
        assert families[f"rivulet_{name}"].documentation
    assert all(name.startswith(("rivulet_", "tgi_", "process_")) for name in families)


def test_metrics_count(tiny_server: LiveServer) -> None:
    names = {
        "requests_total": {"fate": "length"},
        "generated_tokens_total": {},
        "prompt_tokens_sum": {},
        "prompt_tokens_count": {},
        "output_tokens_sum": {},
        "time_to_first_token_seconds_count": {},
        "inter_token_seconds_count": {},
        "request_seconds_count": {},
        "step_rows_sum": {},
    }
    before = {name: metric(tiny_server, name, **labels) for name, labels in names.items()}
    post(tiny_server, "/generate", FORMS[0].body("never asked before", 10))
    change = {name: metric(tiny_server, name, **labels) - before[name] for name, labels in names.items()}
    assert change == {
        "requests_total": 1,
        "generated_tokens_total": 10,
        "prompt_tokens_sum": 18,
        "prompt_tokens_count": 1,
        "output_tokens_sum": 10,
        "time_to_first_token_seconds_count": 1,
        "inter_token_seconds_count": 9,
        "request_seconds_count": 1,
        "step_rows_sum": 18 + 9,  # a decode is one row; the last token is never computed
    }
    assert metric(tiny_server, "cache_blocks_total") == 1024


def test_gauges_show_what_runs(tiny_server: LiveServer) -> None:
    with RawCall(tiny_server, FORMS[1], FORMS[1].body("gauge", 400)) as call:
        call.read_events(3)
        assert metric(tiny_server, "requests_running") == 1
        assert metric(tiny_server, "cache_blocks_used") >= 1
    tiny_server.wait_until_idle()
    assert metric(tiny_server, "requests_running") == metric(tiny_server, "cache_blocks_used") == 0


def test_tokenize_in_tgis_form(tiny_server: LiveServer) -> None:
    assert post(tiny_server, "/tokenize", {"inputs": "hé<|eos|>"}) == [
        {"id": ord("h"), "text": "h", "start": 0, "stop": 1},
        {"id": 0xC3, "text": "é", "start": 1, "stop": 2},  # tokens of one character show it whole
        {"id": 0xA9, "text": "é", "start": 1, "stop": 2},
        {"id": EOS, "text": "<|eos|>", "start": 2, "stop": 9},
    ]
    assert post(tiny_server, "/tokenize", {"inputs": ""}) == []
    assert post(tiny_server, "/tokenize", {"inputs": "h", "parameters": {}, "add_special_tokens": True}) == [
        {"id": ord("h"), "text": "h", "start": 0, "stop": 1}
    ]


def test_tokenize_in_vllms_form(tiny_server: LiveServer) -> None:
    expected = {"count": 2, "max_model_len": 512, "tokens": [ord("h"), ord("i")], "token_strs": None}
    assert post(tiny_server, "/tokenize", {"prompt": "hi"}) == expected
    assert post(tiny_server, "/tokenize", {"prompt": "hi", "add_special_tokens": False}) == expected
    shown = post(tiny_server, "/tokenize", {"prompt": "hi<|eos|>", "return_token_strs": True})
    assert shown["token_strs"] == ["h", "i", "<|eos|>"]
    empty = {"count": 0, "max_model_len": 512, "tokens": [], "token_strs": None}
    assert post(tiny_server, "/tokenize", {"prompt": ""}) == empty
    for more in ({}, {"add_special_tokens": False}):
        chat = post(tiny_server, "/tokenize", {"messages": [{"role": "user", "content": "hi"}]} | more)
        ids = [IM_START, *b"user\nhi", IM_END, *b"\n", IM_START, *b"assistant\n"]
        assert chat == empty | {"count": len(ids), "tokens": ids}


def test_tokenize_refuses_what_it_would_ignore(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        for body, name in (
            ({"inputs": "a", "return_token_strs": True}, "return_token_strs"),
            (
                {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
                "add_special_tokens",
            ),
        ):
            answer = client.post("/tokenize", json=body)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
            assert f"`{name}`" in answer.json()["error"]


def test_chat_tokenize_shows_what_the_model_is_given(tiny_server: LiveServer) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "hé"}]}
    shown = post(tiny_server, "/chat_tokenize", body)
    assert list(shown) == ["tokenize_response", "templated_text"]
    text = "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert shown["templated_text"] == text
    tokens = shown["tokenize_response"]
    assert [list(token) for token in tokens] == [["id", "text", "start", "stop"]] * len(tokens)
    assert tokens[0] == {"id": IM_START, "text": "<|im_start|>", "start": 0, "stop": 12}
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in tokens)
    ids = post(tiny_server, "/tokenize", {"messages": body["messages"]})["tokens"]
    assert [token["id"] for token in tokens] == ids


@pytest.mark.parametrize("text", ["", "plain", "é😎漢", "\0\r\n\x85\u2028", "<|eos|> and <|bos|>", " \t  "])
def test_detokenize_undoes_tokenize(tiny_server: LiveServer, text: str) -> None:
    tokens = post(tiny_server, "/tokenize", {"prompt": text})["tokens"]
    assert post(tiny_server, "/detokenize", {"tokens": tokens}) == {"prompt": text}
    native = post(tiny_server, "/tokenize", {"inputs": text})
    assert [token["id"] for token in native] == tokens


def test_detokenize_shows_special_tokens_and_cut_characters(tiny_server: LiveServer) -> None:
    assert post(tiny_server, "/detokenize", {"tokens": [BOS, 0xC3]}) == {"prompt": "<|bos|>\ufffd"}


def test_the_real_models_tokens(smollm2_server: LiveServer) -> None:
    text = "def f(x):\n    return '漢字 😎' # <|im_end|>"
    tokens = post(smollm2_server, "/tokenize", {"inputs": text})
    assert post(smollm2_server, "/detokenize", {"tokens": [token["id"] for token in tokens]}) == {
        "prompt": text
    }
    words = [text[token["start"] : token["stop"]] for token in tokens]
    assert words[0] == "def"
    assert words[-1] == "<|im_end|>"


def test_the_schema_names_every_route(tiny_server: LiveServer) -> None:
    with tiny_server.client() as client:
        schema = client.get("/openapi.json").json()
    assert {form.path for form in FORMS} <= schema["paths"].keys()
    others = {"/health", "/ping", "/ready", "/info", "/metrics", "/tokenize", "/chat_tokenize", "/detokenize"}
    assert others | {"/v1/models"} <= schema["paths"].keys()
    assert schema["paths"]["/"].keys() == {"get", "post"}


@pytest.mark.alone
def test_an_answer_takes_no_longer_than_its_work(tiny_server: LiveServer) -> None:
    """On a connection that is kept, Nagle's algorithm would add 40 ms to every answer."""
    with tiny_server.client() as client:
        client.get("/health")
        times = []
        for _ in range(21):
            started = time.perf_counter()
            client.post("/tokenize", json={"inputs": "a"})
            times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.03


@pytest.mark.alone
def test_the_event_loop_is_free_while_a_long_text_is_encoded(tiny_server: LiveServer) -> None:
    def encode() -> None:
        post(tiny_server, "/tokenize", {"prompt": "word " * 350_000})

    thread = threading.Thread(target=encode)
    with tiny_server.client() as client:
        thread.start()
        slowest = 0.0
        while thread.is_alive():
            started = time.perf_counter()
            assert client.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - started)
    thread.join()
    assert slowest < 1


def test_a_stopped_engine_is_told_and_nobody_hangs(tiny_folder: Path) -> None:
    """Streams that run get an error event, later calls 503 in their dialect."""
    server = LiveServer(tiny_folder, dtype="float32", max_running=1)
    try:
        engine = server.service.engine
        assert engine._loop is not None
        calls = [RawCall(server, FORMS[1], FORMS[1].body("stop", 450))]
        calls[0].read_events(1)
        calls += [RawCall(server, form, form.body("stop", 450)) for form in (FORMS[5], FORMS[7])]
        wait_for(lambda: server.stats.waiting == 2)
        asyncio.run_coroutine_threadsafe(engine.stop(), engine._loop).result(10)
        for call in calls:
            while data := call.socket.recv(4096):
                call.received += data
                if call.received.endswith(b"0\r\n\r\n"):
                    break
            assert b"shutting down" in call.received
            call.socket.close()
        assert re.search(rb'"error_type":"unavailable"', calls[0].received)
        for call in calls[1:]:
            assert re.search(rb'"type":"server_error".*\n\n.*data: \[DONE\]\n\n', call.received, re.DOTALL)
        with server.client() as client:
            health = client.get("/health")
            assert health.status_code == 503
            assert health.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            assert client.get("/ready").status_code == 503
            for form in FORMS:
                answer = client.post(form.path, json=form.body("late", 1))
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
                kind = answer.json()["error"]["type"] if form.is_openai else answer.json()["error_type"]
                assert kind == ("server_error" if form.is_openai else "unavailable")
            assert client.get("/info").status_code == 200
    finally:
        server.stop()
