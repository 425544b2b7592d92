"""TGI's metric names with real values: each is watched while something happens that it must tell."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from wire import FORMS, Background, RawCall, wait_for

from server.config import ServeSettings

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
