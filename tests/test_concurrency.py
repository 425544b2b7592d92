"""Many clients on one server: nobody's answer depends on the others, and too many are told so at once."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer
from wire import (
    ALL_FORMS,
    FORMS,
    Background,
    Form,
    RawCall,
    chunks,
    close,
    metric,
    native_events,
    num_tasks,
    wait_for,
    without_id,
)

Serve = Callable[..., LiveServer]
Call = tuple[str, dict[str, Any]]


def at_once(server: LiveServer, calls: list[Call]) -> list[httpx.Response]:
    """Send all calls at the same time, each on a connection of its own."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=len(calls))
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(client.post(path, json=body) for path, body in calls))

    return asyncio.run(send())


def one_by_one(server: LiveServer, calls: list[Call]) -> list[httpx.Response]:
    with server.client() as client:
        return [client.post(path, json=body) for path, body in calls]


@pytest.fixture(scope="module")
def full(serve: Serve, tiny_folder: Path) -> LiveServer:
    """One place to run and one to wait."""
    return serve(tiny_folder, dtype="float32", max_running=1, max_waiting=1)


@pytest.fixture(scope="module")
def small_pool(serve: Serve, tiny_folder: Path) -> LiveServer:
    """A cache that holds a few requests at a time: the others are preempted and computed again."""
    return serve(tiny_folder, dtype="float32", kv_cache_tokens=640, token_budget=64)


# What each gets alone


def mixed_calls(count: int) -> list[Call]:
    """Greedy calls of all forms, with prompts of different lengths that partly begin alike."""
    calls = []
    for index, form in zip(range(count), itertools.cycle(ALL_FORMS)):
        prompt = "begins alike " * (index % 5) + f"and ends as number {index}"
        calls.append((form.path, form.body(prompt, 20 + 7 * (index % 4))))
    return calls


def texts(answers: list[httpx.Response]) -> list[str]:
    return [form.text(answer) for form, answer in zip(itertools.cycle(ALL_FORMS), answers, strict=False)]


def test_32_clients_get_what_each_gets_alone(tiny_server: LiveServer) -> None:
    calls = mixed_calls(32)
    alone = texts(one_by_one(tiny_server, calls))
    assert len(set(alone)) == 32
    before = metric(tiny_server, "step_sequences_sum"), metric(tiny_server, "step_sequences_count")
    assert texts(at_once(tiny_server, calls)) == alone
    sequences = metric(tiny_server, "step_sequences_sum") - before[0]
    steps = metric(tiny_server, "step_sequences_count") - before[1]
    assert sequences / steps > 4, "they did not share steps"
    tiny_server.wait_until_idle()


def test_32_clients_in_a_small_pool(small_pool: LiveServer, tiny_server: LiveServer) -> None:
    calls = mixed_calls(32)
    alone = texts(one_by_one(tiny_server, calls))
    assert texts(at_once(small_pool, calls)) == alone
    assert small_pool.stats.scheduler.preemptions > 0
    small_pool.wait_until_idle()
    small_pool.service.engine._scheduler.check()


def test_32_clients_of_the_real_model(smollm2_server: LiveServer) -> None:
    calls = []
    for index, form in zip(range(32), itertools.cycle(FORMS)):
        more = {"details": True} if not form.is_openai else {}
        if form.is_openai and form.stream:
            more = {"stream_options": {"include_usage": True}}
        calls.append((form.path, form.body(f"Question {index}: what is {index} + 1?", 3 + index % 4, **more)))
    for index, (answer, form) in enumerate(zip(at_once(smollm2_server, calls), itertools.cycle(FORMS))):
        assert answer.status_code == 200
        if form.is_openai:
            usage = (chunks(answer.text)[-1] if form.stream else answer.json())["usage"]
            count = usage["completion_tokens"]
        elif form.stream:
            events = native_events(answer.text)
            count = events[-1]["details"]["generated_tokens"]
            assert len(events) == count
        else:
            data = answer.json()
            count = (data[0] if form.path == "/" else data)["details"]["generated_tokens"]
        assert count == 3 + index % 4
    smollm2_server.wait_until_idle()


def test_a_stream_begins_before_it_ends(tiny_server: LiveServer) -> None:
    """Tokens go out as they are made: the first of a long stream is there when most are not made yet."""
    form = FORMS[1]
    made = metric(tiny_server, "generated_tokens_total")
    with RawCall(tiny_server, form, form.body("early", 400)) as call:
        call.read_events(1)
        assert metric(tiny_server, "generated_tokens_total") < made + 200
        call.read_events(400)
    tiny_server.wait_until_idle()


# Seeds


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[6]], ids=str)
def test_a_seed_gives_its_text_whoever_runs_beside_it(exact_server: LiveServer, form: Form) -> None:
    hot = {"temperature": 1.3, "top_p": 0.95}
    call = (form.path, form.body("seeded", 40, seed=11, **hot))
    (alone,) = (form.text(answer) for answer in one_by_one(exact_server, [call]))
    others = [(form.path, form.body(f"neighbour {i}", 60, seed=i, **hot)) for i in range(16)]
    answers = at_once(exact_server, [*others[:8], call, *others[8:]])
    assert form.text(answers[8]) == alone
    assert len({form.text(answer) for answer in answers}) == 17
    different = one_by_one(exact_server, [(form.path, form.body("seeded", 40, seed=12, **hot))])
    assert form.text(different[0]) != alone


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_three_ways_to_be_greedy(tiny_server: LiveServer, form: Form) -> None:
    with tiny_server.client() as client:
        answers = [
            form.text(client.post(form.path, json=form.body("greedy", 40, **more)))
            for more in (
                {"temperature": 0},
                {"temperature": 0, "seed": 5, "top_p": 0.5},
                {"temperature": 1.0, "top_k": 1},
                {"temperature": 1.0, "top_k": 1, "seed": 9},
                {"temperature": 1.0, "top_p": 1e-9},
                {"temperature": 1.0, "min_p": 1.0},
            )
        ]
    assert len(set(answers)) == 1


def test_no_seed_is_a_new_seed(tiny_server: LiveServer) -> None:
    form = FORMS[0]
    calls = [(form.path, form.body("x", 24, temperature=1.0)) for _ in range(16)]
    assert len({form.text(answer) for answer in at_once(tiny_server, calls)}) == 16


# Too many


@pytest.fixture
def crowd(full: LiveServer) -> Iterator[list[Background]]:
    """One call that runs and one that waits."""
    form = FORMS[0]
    full.wait_until_idle()
    with full.slowed(0.002):
        running = Background(full, form, form.body("runs", 450))
        wait_for(lambda: full.stats.running == 1)
        waiting = Background(full, form, form.body("waits", 5))
        wait_for(lambda: full.service.engine.num_requests == 2)
        yield [running, waiting]
    assert [len(call.answer().json()) for call in (running, waiting)] == [1, 1]
    full.wait_until_idle()


@pytest.mark.alone
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_one_too_many_is_told_at_once(full: LiveServer, crowd: list[Background], form: Form) -> None:
    rejected = metric(full, "rejections_total", reason="overloaded")
    with full.client() as client:
        client.get("/health")  # connected
        started = time.perf_counter()
        answer = client.post(form.path, json=form.body("one too many", 5))
        seconds = time.perf_counter() - started
        assert not crowd[0].done, "too slow to show anything"
        assert answer.status_code == 429
        assert seconds < 0.1
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["content-type"] == "application/json"
        if form.is_openai:
            error = {"message": "Model is overloaded", "type": "rate_limit_error", "param": None}
            expected: object = {"error": error | {"code": "overloaded"}}
        else:
            expected = {"error": "Model is overloaded", "error_type": "overloaded"}
        assert without_id(answer.json(), answer) == expected
        assert metric(full, "rejections_total", reason="overloaded") == rejected + 1
        assert client.get("/health").status_code == 200
        for call in crowd:
            call.answer()
        assert form.text(client.post(form.path, json=form.body("again", 5))) is not None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_choice_takes_a_place(full: LiveServer, path: str) -> None:
    full.wait_until_idle()
    form = Form(path, False)
    with full.client() as client:
        for n, status in ((2, 200), (3, 400), (1, 200)):  # two places: three never fit
            assert client.post(path, json=form.body("places", 3, n=n)).status_code == status
        if path == "/v1/completions":
            for prompts, n, status in ((2, 1, 200), (2, 2, 400), (3, 1, 400)):
                body = form.body("x", 3, n=n) | {"prompt": ["p"] * prompts}
                assert client.post(path, json=body).status_code == status
    full.wait_until_idle()


def test_a_burst_is_served_or_told(full: LiveServer) -> None:
    calls = [
        (form.path, form.body(f"burst {i}", 30)) for i, form in zip(range(40), itertools.cycle(ALL_FORMS))
    ]
    answers = at_once(full, calls)
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    full.wait_until_idle()
    served = [index for index, status in enumerate(statuses) if status == 200]
    alone = one_by_one(full, [calls[index] for index in served])
    for index, again in zip(served, alone, strict=True):
        form = ALL_FORMS[index % len(ALL_FORMS)]
        assert form.text(answers[index]) == form.text(again)


# A step that fails


@pytest.fixture
def fail_once(tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Let the next step raise; tells how many sequences it had."""
    runner = tiny_server.service.engine._runner
    execute = runner.execute
    failed: list[int] = []

    def arm() -> list[int]:
        def failing(batch: Any) -> Any:
            if not failed:
                failed.append(len(batch.chunks))
                raise RuntimeError("/secret/path: 0xdeadbeef")
            return execute(batch)

        monkeypatch.setattr(runner, "execute", failing)
        return failed

    return arm


def test_a_failed_step_is_told_to_those_at_fault_and_to_nobody_else(
    tiny_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of all forms at once, half of which make the model raise whenever they are in a step."""
    bad = [(form.path, form.body(f"fails ~{index}", 120)) for index, form in enumerate(FORMS)]
    calls = [(form.path, form.body(f"goes well {index}", 120)) for index, form in enumerate(FORMS)]
    runner = tiny_server.service.engine._runner
    execute = runner.execute
    beside: list[int] = []

    def failing(batch: Any) -> Any:
        marked = [chunk for chunk in batch.chunks if ord("~") in chunk.token_ids[: chunk.prompt_length]]
        if any(len(chunk.token_ids) > chunk.prompt_length + 5 for chunk in marked):
            beside.append(len(batch.chunks) - len(marked))
            raise RuntimeError("/secret/path: 0xdeadbeef")
        return execute(batch)

    with tiny_server.client() as client:
        good = texts(one_by_one(tiny_server, calls))
        errors = metric(tiny_server, "requests_total", fate="error")
        tiny_server.wait_until_idle()
        tasks = num_tasks(tiny_server)
        monkeypatch.setattr(runner, "execute", failing)
        answers = at_once(tiny_server, [*calls, *bad])
        assert texts(answers[: len(calls)]) == good
        assert any(beside), "they did not share steps"
        for form, answer in zip(FORMS, answers[len(calls) :], strict=True):
            check_failure(form, answer)
        assert metric(tiny_server, "requests_total", fate="error") == errors + len(bad)
        tiny_server.wait_until_idle(1)
        wait_for(lambda: num_tasks(tiny_server) <= tasks)
        tiny_server.service.engine._scheduler.check()
        assert client.get("/health").status_code == 200


def check_failure(form: Form, answer: httpx.Response) -> None:
    """The form's one error, with nothing of the exception in it."""
    assert "secret" not in answer.text
    assert "0x" not in answer.text
    assert "Traceback" not in answer.text
    if not form.stream:
        assert answer.status_code == (500 if form.is_openai else 424)
        error = answer.json()
    else:
        assert answer.status_code == 200
        *events, error = chunks(answer.text) if form.is_openai else native_events(answer.text)
        assert all("error" not in event for event in events)
    error = without_id(error, answer)
    if form.is_openai:
        assert list(error) == ["error"]
        assert error["error"]["type"] == "server_error"
        assert list(error["error"]) == ["message", "type", "param", "code"]
    else:
        assert list(error) == ["error", "error_type"]
        assert error["error_type"] == "generation"
        assert error["error"].startswith("Request failed during generation: ")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_prefill_that_fails(
    tiny_server: LiveServer, fail_once: Callable[[], list[int]], form: Form
) -> None:
    """The prompt's blocks hold what was half computed; the next call with that prompt must not find it."""
    prompt = f"a prompt of many blocks that is new to the prefix cache, for {form}: " * 3
    failed = fail_once()
    with tiny_server.client() as client:
        answer = client.post(form.path, json=form.body(prompt, 20))
        assert failed == [1]
        assert answer.status_code == (200 if form.stream else 500 if form.is_openai else 424)
        assert '"error"' in answer.text
        tiny_server.wait_until_idle(1)
        text = form.text(client.post(form.path, json=form.body(prompt, 20)))
        assert form.text(client.post(form.path, json=form.body(prompt, 20))) == text
    tiny_server.service.engine._scheduler.check()


def test_who_waits_is_not_touched_by_a_failed_step(full: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[0]
    full.wait_until_idle()
    with full.client() as client:
        alone = form.text(client.post(form.path, json=form.body("waits", 20)))
    runner = full.service.engine._runner
    execute = runner.execute
    running = Background(full, form, form.body("runs", 450))
    wait_for(lambda: full.stats.running == 1)
    waiting = Background(full, form, form.body("waits", 20))
    wait_for(lambda: full.stats.waiting == 1)

    def failing(batch: Any) -> Any:
        monkeypatch.setattr(runner, "execute", execute)
        raise RuntimeError("once")

    monkeypatch.setattr(runner, "execute", failing)
    assert running.answer().status_code == 424
    assert waiting.text() == alone
    full.wait_until_idle()


# One request's parameters are its own


def test_parameters_of_neighbours_do_not_mix(exact_server: LiveServer) -> None:
    """Each of many calls with parameters of its own gets what it gets alone, details included."""
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "seed": 1, "top_k": 3},
        {"top_p": 0.3, "seed": 2},
        {"min_p": 0.2, "seed": 3},
        {"repetition_penalty": 0.5},
        {"repetition_penalty": 0.7, "temperature": 1.0, "seed": 4},
        {"frequency_penalty": 2.0},
        {"presence_penalty": -2.0, "do_sample": True, "seed": 5},
        {"stop": ["X", "S", "a", "h"]},
        {"top_n_tokens": 5},
        {"decoder_input_details": True},
        {"truncate": 3},
        {"return_full_text": True},
    ]
    calls = [
        ("/generate", FORMS[0].body("one prompt for all of them", 30, details=True, **variant))
        for variant in variants
    ]
    alone = [answer.json() for answer in one_by_one(exact_server, calls)]
    together = [answer.json() for answer in at_once(exact_server, calls)]
    for variant, one, other in zip(variants, alone, together, strict=True):
        assert close(one, other), (variant, json.dumps(one)[:300], json.dumps(other)[:300])
    seen = [json.dumps(answer) for answer in alone]
    same = [variants[i] for i in range(len(seen)) if seen.count(seen[i]) > 1]
    assert not same
