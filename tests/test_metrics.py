"""The metrics have real values: each is watched while something happens that it must tell."""

import math
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from live import LiveServer
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families
from wire import FORMS, Background, RawCall, wait_for

from model.errors import OutOfMemory
from server.config import ServeSettings
from server.engine.records import StepRecord
from server.engine.submission import Submission
from server.errors import Rejection
from server.metrics import Fate, Fault, Metrics, Proposer

PAGE = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
KEY = "a-key-of-the-metrics-test"
GAUGES = ("tgi_batch_current_max_tokens", "tgi_batch_current_size", "tgi_queue_size")
COUNTERS = (
    *("tgi_batch_inference_count", "tgi_batch_inference_success", "tgi_batch_inference_failure"),
    *("tgi_request_count", "tgi_request_success", "tgi_request_failure"),
)
STEP_DURATIONS = (
    *("tgi_batch_decode_duration", "tgi_batch_filter_duration"),
    *("tgi_batch_forward_duration", "tgi_batch_inference_duration"),
)
REQUEST_DURATIONS = (
    *("tgi_request_duration", "tgi_request_inference_duration", "tgi_request_queue_duration"),
    *("tgi_request_mean_time_per_token_duration", "tgi_request_validation_duration"),
)
SIZES = (
    *("tgi_batch_next_size", "tgi_request_generated_tokens", "tgi_request_input_length"),
    *("tgi_request_max_new_tokens", "tgi_request_skipped_tokens"),
)


@pytest.fixture(scope="module")
def server(serve: Callable[..., LiveServer], tiny_folder: Path) -> LiveServer:
    """A server of its own, with one place to run, so that what is counted is what a test did."""
    return serve(
        tiny_folder, dtype="float32", max_running=2, max_waiting=2, max_best_of=4, prefix_cache=False
    )


@pytest.fixture
def quiet(server: LiveServer) -> Iterator[LiveServer]:
    server.wait_until_idle()
    yield server
    server.wait_until_idle()


def read(server: LiveServer) -> dict[str, float]:
    """Every sample that /metrics gives now, labels included."""
    with server.client() as client:
        text = client.get("/metrics").text
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    return samples


def change(server: LiveServer, before: dict[str, float]) -> dict[str, float]:
    """What counts otherwise than before."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in read(server).items()
        if value != before.get(name, 0.0)
    }


def call(server: LiveServer, text: str, tokens: int, form: int = 0, **parameters: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(FORMS[form].path, json=FORMS[form].body(text, tokens, **parameters))


def test_every_documented_name_is_there_with_its_type(quiet: LiveServer) -> None:
    with quiet.client() as client:
        text = client.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for names, kind in (
        (GAUGES, "gauge"),
        (COUNTERS, "counter"),
        ((*STEP_DURATIONS, *REQUEST_DURATIONS, *SIZES), "histogram"),
    ):
        assert {name: types.get(name) for name in names} == dict.fromkeys(names, kind)
    # Under exactly these names: no `_total`, which a dashboard made for TGI would not find.
    samples = read(quiet)
    assert "tgi_request_count" in samples
    assert 'tgi_batch_inference_count{method="prefill"}' in samples
    assert not any(name.startswith("tgi_") and "_total" in name for name in samples)
    assert "rivulet_step_seconds_count" in samples
    families = {family.name for family in text_string_to_metric_families(text)}
    assert set(COUNTERS) | set(GAUGES) <= families


def buckets(samples: dict[str, float], name: str, label: str = "") -> list[float]:
    found = [re.fullmatch(rf'{name}_bucket{{le="(.*)"{label}}}', sample) for sample in samples]
    return [float(match[1].replace("+Inf", "inf")) for match in found if match]


def test_the_buckets_are_tgis(quiet: LiveServer) -> None:
    samples = read(quiet)
    durations = [*(pytest.approx(0.0001 * 1.5**k) for k in range(1, 36)), math.inf]
    for name in REQUEST_DURATIONS:
        assert buckets(samples, name) == durations, name
    for name in STEP_DURATIONS:
        for method in ("prefill", "decode"):
            assert buckets(samples, name, f',method="{method}"') == durations, name
    hundred = [*(pytest.approx(5.12 * k) for k in range(1, 101)), math.inf]
    assert buckets(samples, "tgi_request_generated_tokens") == hundred
    assert buckets(samples, "tgi_request_max_new_tokens") == hundred
    inputs = [*(pytest.approx(5.11 * k) for k in range(1, 101)), math.inf]
    assert buckets(samples, "tgi_request_input_length") == inputs
    assert buckets(samples, "tgi_batch_next_size") == [1, 2, math.inf]


COUNTED = {
    'tgi_batch_inference_count{method="prefill"}': 1,
    'tgi_batch_inference_count{method="decode"}': 9,
    'tgi_batch_inference_success{method="prefill"}': 1,
    'tgi_batch_inference_success{method="decode"}': 9,
    **{f'{name}_count{{method="prefill"}}': 1 for name in STEP_DURATIONS},
    **{f'{name}_count{{method="decode"}}': 9 for name in STEP_DURATIONS},
    **{f"{name}_count": 1 for name in (*REQUEST_DURATIONS, *SIZES)},
    "tgi_request_count": 1,
    "tgi_request_success": 1,
    "tgi_request_generated_tokens_sum": 10,
    "tgi_request_input_length_sum": 7,
    "tgi_request_max_new_tokens_sum": 10,
    "tgi_batch_next_size_sum": 1,
}


@pytest.mark.parametrize("form", range(6))
def test_one_call_counts_once_whatever_its_form(quiet: LiveServer, form: int) -> None:
    before = read(quiet)
    assert call(quiet, "7 bytes", 10, form).status_code == 200
    told = change(quiet, before)
    assert {name: told.get(name, 0) for name in COUNTED} == COUNTED
    assert not any(name.startswith("tgi_request_failure") for name in told)
    assert "tgi_request_skipped_tokens_sum" not in told


def test_the_durations_add_up(quiet: LiveServer) -> None:
    before = read(quiet)
    answer = call(quiet, "7 bytes", 100)
    told = {name.removesuffix("_sum"): value for name, value in change(quiet, before).items()}
    total = told["tgi_request_duration"]
    parts = ("validation", "queue", "inference")
    assert total == pytest.approx(sum(told[f"tgi_request_{part}_duration"] for part in parts))
    assert all(told[f"tgi_request_{part}_duration"] > 0 for part in parts)
    inference = told["tgi_request_inference_duration"]
    assert told["tgi_request_mean_time_per_token_duration"] == pytest.approx(inference / 100)
    for method in ("prefill", "decode"):
        forward = told[f'tgi_batch_forward_duration_sum{{method="{method}"}}']
        whole = told[f'tgi_batch_inference_duration_sum{{method="{method}"}}']
        after = told[f'tgi_batch_filter_duration_sum{{method="{method}"}}']
        assert 0 < after < whole
        assert forward + after <= whole < inference * 1.5 + 0.1
        assert told[f'tgi_batch_decode_duration_sum{{method="{method}"}}'] > 0
    # The headers tell the same, in whole milliseconds.
    assert float(answer.headers["x-compute-time"]) == pytest.approx(total, abs=1e-5)
    assert int(answer.headers["x-total-time"]) == int(total * 1000)
    for part in parts:
        assert int(answer.headers[f"x-{part}-time"]) == int(told[f"tgi_request_{part}_duration"] * 1000)
    assert int(answer.headers["x-time-per-token"]) == int(inference / 100 * 1000)


def test_candidates_are_one_call(quiet: LiveServer) -> None:
    before = read(quiet)
    answer = call(quiet, "abc", 10, best_of=2, do_sample=True)
    assert answer.headers["x-generated-tokens"] == "10"
    told = change(quiet, before)
    assert (told["tgi_request_count"], told["tgi_request_success"]) == (1, 1)
    assert told["tgi_request_generated_tokens_sum"] == 20
    assert told["tgi_request_input_length_count"] == 2
    assert told["tgi_request_max_new_tokens_sum"] == 20
    assert told["tgi_request_duration_count"] == 1


def test_candidates_share_their_prompt(quiet: LiveServer) -> None:
    before = read(quiet)
    assert call(quiet, "x" * 100, 10, best_of=2, do_sample=True).status_code == 200
    told = change(quiet, before)
    assert told["rivulet_step_rows_sum"] == 100 + 1 + 2 * 9  # the second computes the last row by itself
    assert told['tgi_batch_inference_count{method="prefill"}'] == 2


def test_the_gauges_and_the_queue(quiet: LiveServer) -> None:
    before = read(quiet)
    running = [RawCall(quiet, FORMS[1], FORMS[1].body("run", 500)) for _ in range(2)]
    waiting = None
    try:
        for run in running:
            run.read_events(1)
        waiting = Background(quiet, FORMS[0], FORMS[0].body("wait", 3))
        wait_for(lambda: quiet.stats.waiting == 1)
        samples = read(quiet)
        assert [samples[name] for name in GAUGES] == [2 * (3 + 500), 2, 1]
        waited = samples["tgi_request_queue_duration_sum"]
    finally:
        for run in running:
            run.leave()
    assert waiting is not None
    answer = waiting.answer()
    assert int(answer.headers["x-queue-time"]) > 0
    quiet.wait_until_idle()
    told = change(quiet, before)
    queued = read(quiet)["tgi_request_queue_duration_sum"] - waited
    assert int(queued * 1000) == int(answer.headers["x-queue-time"])
    assert told['tgi_request_failure{err="dropped"}'] == 2
    assert told["tgi_request_success"] == 1
    samples = read(quiet)
    assert [samples[name] for name in GAUGES] == [0, 0, 0]


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/generate", {"inputs": ""}, "validation"),
        ("/generate", {"inputs": 5}, "validation"),
        ("/generate_stream", {"inputs": "a", "parameters": {"top_k": 0}}, "validation"),
        ("/", {"inputs": "a", "parameters": {"watermark": True}}, "validation"),
        ("/v1/completions", {"prompt": "a", "n": 0}, "validation"),
        ("/v1/chat/completions", {"messages": []}, "validation"),
    ],
)
def test_a_refusal_is_a_call_and_a_failure(
    quiet: LiveServer, path: str, body: dict[str, Any], error: str
) -> None:
    before = read(quiet)
    with quiet.client() as client:
        assert client.post(path, json=body).status_code in (400, 422)
    told = {name: value for name, value in change(quiet, before).items() if name.startswith("tgi_")}
    assert told == {"tgi_request_count": 1, f'tgi_request_failure{{err="{error}"}}': 1}


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/chat_tokenize"])
def test_what_generates_nothing_counts_nothing(quiet: LiveServer, path: str) -> None:
    before = read(quiet)
    with quiet.client() as client:
        for method, where in (("GET", "/"), ("GET", "/health"), ("GET", "/info"), ("POST", path)):
            client.request(method, where, json={"tokens": 5} if method == "POST" else None)
    assert not any(name.startswith("tgi_") for name in change(quiet, before))


def test_a_full_queue_and_a_failed_step(quiet: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet.slowed(0.02):
        calls = [RawCall(quiet, FORMS[1], FORMS[1].body("full", 400)) for _ in range(4)]
        calls[0].read_events(1)
        wait_for(lambda: quiet.service.engine.num_requests == 4)
        before = read(quiet)
        assert call(quiet, "more", 1).status_code == 429
        for one in calls:
            one.leave()
        quiet.wait_until_idle()
    told = change(quiet, before)
    assert told['tgi_request_failure{err="overloaded"}'] == 1
    assert told['tgi_request_failure{err="dropped"}'] == 4

    def fail(batch: object) -> None:
        raise RuntimeError("a test's")

    before = read(quiet)
    monkeypatch.setattr(quiet.service.engine._runner, "execute", fail)
    assert call(quiet, "abc", 5).status_code == 424
    told = change(quiet, before)
    assert told['tgi_batch_inference_count{method="prefill"}'] == 1
    assert told['tgi_batch_inference_failure{method="prefill"}'] == 1
    assert told['tgi_request_failure{err="generation"}'] == 1
    assert 'tgi_batch_inference_success{method="prefill"}' not in told
    assert "tgi_request_success" not in told
    assert "rivulet_step_seconds_count" not in told


def test_the_guide_names_what_there_is(quiet: LiveServer) -> None:
    """docs/from-tgi.md: its flags are settings of ours, its metrics are those of /metrics."""
    guide = (Path(__file__).parents[1] / "docs/from-tgi.md").read_text()
    table = re.search(r"\| TGI \| Rivulet \| note \|\n.*?\n\n", guide, re.DOTALL)
    assert table is not None
    ours = [row.split(" | ")[1] for row in table[0].splitlines()[2:] if row]
    flags = {flag for cell in ours for flag in re.findall(r"`--([a-z-]+)`", cell)}
    assert len(flags) > 10
    assert {flag.replace("-", "_") for flag in flags} <= ServeSettings.model_fields.keys()
    told = set(re.findall(r"`(tgi_\w+)`", guide.split("## Metrics")[1].split("Of TGI's undocumented")[0]))
    assert told == {*GAUGES, *COUNTERS, *STEP_DURATIONS, *REQUEST_DURATIONS, *SIZES}


def documented() -> dict[str, tuple[str, set[str]]]:
    """docs/metrics.md: each metric's type and labels."""
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \| (.*?)\| ", PAGE, re.MULTILINE)
    assert len(rows) > 25
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exposed(server: LiveServer) -> dict[str, tuple[str, set[str]]]:
    """The same of what /metrics gives, TGI's names aside."""
    with server.client() as client:
        text = client.get("/metrics").text
    families = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("tgi_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels}
            families[name] = (family.type, labels - {"le"})
            assert family.documentation, name
    return families


def test_the_page_names_what_there_is(quiet: LiveServer) -> None:
    assert exposed(quiet) == documented()


def test_every_value_of_a_label_is_there_from_the_start(quiet: LiveServer) -> None:
    samples = read(quiet)
    for family, label, kind in (
        ("requests", "fate", Fate),
        ("rejections", "reason", Rejection),
        ("faults", "kind", Fault),
        ("speculative_proposed_tokens", "proposer", Proposer),
        ("speculative_accepted_tokens", "proposer", Proposer),
    ):
        told = {name for name in samples if name.startswith(f"rivulet_{family}_total")}
        assert told == {f'rivulet_{family}_total{{{label}="{value}"}}' for value in get_args(kind)}
    assert set(re.findall(r"^\| `(\w+)` \| \d{3}", PAGE, re.MULTILINE)) == set(get_args(Rejection))


def ours(server: LiveServer, before: dict[str, float], *families: str) -> dict[str, float]:
    """What changed of some of our families, their prefix left out."""
    names = tuple(f"rivulet_{family}" for family in families)
    told = change(server, before)
    return {n.removeprefix("rivulet_"): v for n, v in told.items() if n.startswith(names)}


@pytest.fixture(scope="module")
def strict(serve: Callable[..., LiveServer], tiny_folder: Path) -> LiveServer:
    """A server that refuses for each reason that there is."""
    return serve(
        tiny_folder, dtype="float32", max_running=1, max_waiting=0, max_body_bytes=1024, header_timeout=0.3
    )


@pytest.mark.parametrize(
    ("reason", "method", "path", "body", "status"),
    [
        ("invalid", "POST", "/generate", {"inputs": ""}, 422),
        ("invalid", "POST", "/v1/completions", {"prompt": 1.5}, 400),
        ("invalid", "POST", "/tokenize", {}, 422),
        ("invalid", "GET", "/nothing", None, 404),
        ("invalid", "DELETE", "/generate", None, 405),
        ("too_large", "POST", "/generate", {"inputs": "x" * 2000}, 413),
        ("host", "GET", "/info", None, 403),
    ],
)
def test_a_refusal_is_counted_once_by_its_reason(
    strict: LiveServer, reason: str, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    before = read(strict)
    with strict.client() as client:
        headers = {"Host": "example.com"} if reason == "host" else {}
        assert client.request(method, path, json=body, headers=headers).status_code == status
    assert ours(strict, before, "rejections", "requests_total") == {
        f'rejections_total{{reason="{reason}"}}': 1
    }


def test_a_full_server_counts_whom_it_refuses(strict: LiveServer) -> None:
    before = read(strict)
    with RawCall(strict, FORMS[1], FORMS[1].body("full", 500)) as running:
        running.read_events(1)
        for form in (0, 1, 4, 7):
            assert call(strict, "more", 1, form).status_code == 429
    strict.wait_until_idle()
    assert ours(strict, before, "rejections", "requests_total") == {
        'rejections_total{reason="overloaded"}': 4,
        'requests_total{fate="aborted"}': 1,
    }


def test_what_ends_before_the_application_is_counted_too(strict: LiveServer) -> None:
    before = read(strict)
    for sent, status in ((b"GET /health HTTP/1.1\r\nHo", b"408"), (b"\0\r\n\r\n", b"400")):
        with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
            connection.sendall(sent)
            assert status in connection.recv(4096)
    assert ours(strict, before, "rejections") == {
        'rejections_total{reason="timeout"}': 1,
        'rejections_total{reason="invalid"}': 1,
    }


def test_a_missing_key_and_one_connection_too_many(
    serve: Callable[..., LiveServer], tiny_folder: Path
) -> None:
    server = serve(tiny_folder, dtype="float32", api_keys=(KEY,), max_connections=2)
    with server.client(headers={"Authorization": f"Bearer {KEY}"}) as client:

        def told() -> dict[str, float]:
            lines = client.get("/metrics").text.splitlines()
            samples = [line.rsplit(" ", 1) for line in lines if line.startswith("rivulet_")]
            return {name: float(value) for name, value in samples}

        before = told()
        assert before["rivulet_connections"] == 1
        with socket.create_connection(("127.0.0.1", server.port)) as second:
            second.sendall(b"GET /info HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"401" in second.recv(4096)
            with socket.create_connection(("127.0.0.1", server.port)) as third:
                assert b"503" in third.recv(4096)
            after = told()
            assert after["rivulet_connections"] == 2
        for reason in ("unauthorized", "connections"):
            name = f'rivulet_rejections_total{{reason="{reason}"}}'
            assert after[name] == before[name] + 1


def test_the_time_to_the_first_token_is_queue_and_prefill(quiet: LiveServer) -> None:
    before = read(quiet)
    running = [RawCall(quiet, FORMS[1], FORMS[1].body("run", 500)) for _ in range(2)]
    for run in running:
        run.read_events(1)
    waiting = Background(quiet, FORMS[0], FORMS[0].body("wait", 3))
    wait_for(lambda: quiet.stats.waiting == 1)
    samples = read(quiet)
    assert samples["rivulet_oldest_waiting_seconds"] > 0
    assert samples["rivulet_waiting_prompt_tokens"] == len("wait")
    assert samples["rivulet_connections"] >= 3
    for run in running:
        run.leave()
    assert waiting.answer().status_code == 200
    quiet.wait_until_idle()
    told = ours(quiet, before, "")
    assert [told[f"{name}_count"] for name in ("queue_seconds", "prefill_seconds")] == [3, 3]
    assert told["queue_seconds_sum"] > samples["rivulet_oldest_waiting_seconds"]
    first = told["time_to_first_token_seconds_sum"]
    assert first == pytest.approx(told["queue_seconds_sum"] + told["prefill_seconds_sum"])
    assert told['requests_total{fate="aborted"}'] == 2
    assert told['requests_total{fate="length"}'] == 1
    assert read(quiet)["rivulet_oldest_waiting_seconds"] == 0


def test_preemptions_and_cache_hits_are_counted(serve: Callable[..., LiveServer], tiny_folder: Path) -> None:
    server = serve(tiny_folder, dtype="float32", kv_cache_tokens=512, max_running=2)
    before = read(server)
    calls = [Background(server, FORMS[0], FORMS[0].body(letter * 100, 300)) for letter in "ab"]
    assert [one.answer().status_code for one in calls] == [200, 200]
    assert call(server, "a" * 100, 1).status_code == 200
    told = ours(server, before, "preemptions", "prefix_cache")
    assert told["preemptions_total"] >= 1
    assert told["prefix_cache_prompt_tokens_total"] == 300
    assert told["prefix_cache_hit_tokens_total"] >= 96


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a test's"), {"failed_step": 1}),
        (OutOfMemory("a test's"), {"failed_step": 1, "out_of_memory": 1}),
    ],
)
def test_a_fault_is_counted(
    quiet: LiveServer, monkeypatch: pytest.MonkeyPatch, error: Exception, told: dict[str, int]
) -> None:
    def fail(batch: object) -> None:
        raise error

    before = read(quiet)
    with monkeypatch.context() as patch:
        patch.setattr(quiet.service.engine._runner, "execute", fail)
        assert call(quiet, "abc", 5).status_code >= 400
    assert call(quiet, "abc", 5).status_code == 200
    assert ours(quiet, before, "faults", "requests_total") == {
        **{f'faults_total{{kind="{kind}"}}': count for kind, count in told.items()},
        'requests_total{fate="error"}': 1,
        'requests_total{fate="length"}': 1,
    }


@pytest.mark.alone
def test_reading_them_is_cheap(quiet: LiveServer) -> None:
    """On the event loop, between two tokens: a millisecond or two, with room for a busy machine."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        quiet.service.metrics.render()
        times.append(time.perf_counter() - began)
    assert min(times) < 0.01


@pytest.mark.alone
def test_a_token_and_a_step_cost_next_to_nothing() -> None:
    """By ratio to one observation of prometheus_client's own histogram; it was 2.4 and 16 with those."""
    metrics = Metrics(8192, 64, {"version": "0"})
    clock = metrics.start_request(10, 10, Submission((), lambda request_id: None))
    yardstick = Histogram("yardstick", "of speed", registry=CollectorRegistry())
    step = StepRecord(0.002, 8, 8, 0, 0.003, 0.0001)

    def cost(work: Callable[[], None]) -> float:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(500):
                work()
            times.append(time.perf_counter() - began)
        return min(times)

    observe = cost(lambda: yardstick.observe(0.002))
    assert cost(lambda: clock.count_token(time.perf_counter())) < observe
    assert cost(lambda: metrics.record_step(step)) < 6 * observe
