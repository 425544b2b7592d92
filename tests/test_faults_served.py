"""Faults of the model under a live server: each dialect's own error, and the neighbours' texts unharmed."""

import asyncio
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from live import LiveServer
from pydantic_core import to_json
from test_faults import Break, Seam, nothing
from wire import ALL_FORMS, FORMS, Background, Form, RawCall, metric, num_tasks, wait_for

from model.batch import Batch
from model.errors import OutOfMemory
from model.runner import MASK_FAILED, NOTHING_ALLOWED
from server.engine.engine import MEMORY_SHORT, STEP_FAILED, Fault
from server.generation import TEXT_FAILED
from server.routes import delivery
from server.text.detokenizer import Detokenizer

STREAMS = [form for form in ALL_FORMS if form.stream]
VICTIM = FORMS[1]
MARK = "~"
"""Stands in the prompts that a test breaks."""
SECRET = "/secret/path: 0xdeadbeef"


@pytest.fixture
def seam(exact_server: LiveServer) -> Iterator[Seam]:
    """What stands between the server's engine and its runner while a test runs."""
    engine = exact_server.service.engine
    exact_server.wait_until_idle()
    runner = engine._runner
    yield Seam.of(engine)
    engine._runner = runner
    exact_server.wait_until_idle()
    engine._scheduler.check()


@pytest.fixture(scope="module")
def alone(exact_server: LiveServer) -> str:
    """What the victim gets when nobody else is there."""
    with exact_server.client() as client:
        return VICTIM.text(client.post(VICTIM.path, json=VICTIM.body("victim", 100)))


@pytest.fixture
def victim(exact_server: LiveServer, alone: str) -> Iterator[None]:
    """Another client, who streams all the time and must always get the same."""
    texts: list[str] = []
    over = threading.Event()

    def stream() -> None:
        with exact_server.client() as client:
            while not over.is_set():
                texts.append(VICTIM.text(client.post(VICTIM.path, json=VICTIM.body("victim", 100))))

    thread = threading.Thread(target=stream)
    thread.start()
    yield
    over.set()
    thread.join(30)
    assert texts and set(texts) == {alone}


def others_leave(server: LiveServer) -> None:
    """Nobody but the victim is there any more."""
    wait_for(lambda: server.service.engine.num_requests <= 1, 2)


def breaking(error: Callable[[], Exception], tokens: int) -> Break:
    """Raises for marked prompts once they have so many output tokens."""

    def check(batch: Batch) -> None:
        for chunk in batch.chunks:
            marked = ord(MARK) in chunk.token_ids[: chunk.prompt_length]
            if marked and len(chunk.token_ids) - chunk.prompt_length >= tokens:
                raise error()

    return check


def broken() -> Exception:
    return RuntimeError(SECRET)


def told(form: Form, answer: httpx.Response) -> tuple[str, str]:
    """Kind and text of the one error that an answer or a stream ends with; nothing of the inside is in it."""
    for leak in (SECRET, "0x", "Traceback", "RuntimeError"):
        assert leak not in answer.text
    if form.stream:
        assert answer.status_code == 200
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        errors = [json.loads(line.removeprefix("data: ")) for line in lines if '"error' in line]
        errors = [error for error in errors if error.get("error") or error.get("type") == "error"]
        assert errors
        body = errors[0]
    else:
        body = answer.json()
    if form.path == "/v1/responses" and form.stream:
        assert body["type"] == "error" and '"type":"response.failed"' in lines[-1]
        return body["code"], body["message"]
    if form.is_openai:
        return body["error"]["type"], body["error"]["message"]
    return body["error_type"], body["error"]


@pytest.mark.usefixtures("victim")
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_request_that_fails_is_told_so(exact_server: LiveServer, seam: Seam, tokens: int) -> None:
    errors = metric(exact_server, "requests_total", fate="error")
    seam.before = breaking(broken, tokens)
    with exact_server.client() as client:
        for form in ALL_FORMS:
            kind, text = told(form, answer := client.post(form.path, json=form.body(f"broken {MARK}", 20)))
            anthropic = form.path == "/v1/messages"
            assert kind == ("api_error" if anthropic else "server_error" if form.is_openai else "generation")
            assert text.endswith(STEP_FAILED)
            if not form.stream:
                assert answer.status_code == (500 if form.is_openai else 424)
            assert client.get("/health").status_code == 200
            assert form.text(client.post(form.path, json=form.body("good", 3))) is not None
    assert metric(exact_server, "requests_total", fate="error") == errors + len(ALL_FORMS)
    shared = [batch for batch in seam.batches if len(batch.chunks) > 1]
    assert len(shared) > len(ALL_FORMS), "nobody was beside them"


def test_memory_that_is_short_is_an_overload(exact_server: LiveServer, alone: str, seam: Seam) -> None:
    """The newest goes, with a status that says to come again where there is one."""

    def short(batch: Batch) -> None:
        if any(ord(MARK) in chunk.token_ids for chunk in batch.chunks):
            raise OutOfMemory(SECRET)

    with exact_server.client() as client:
        for form in ALL_FORMS:
            exact_server.wait_until_idle()
            older = Background(exact_server, VICTIM, VICTIM.body("victim", 100))
            wait_for(lambda: exact_server.stats.running == 1)
            seam.before = short
            kind, text = told(form, answer := client.post(form.path, json=form.body(f"newest {MARK}", 20)))
            if form.path == "/v1/responses" and form.stream:
                assert kind == "overloaded"
            else:
                assert kind == ("rate_limit_error" if form.is_openai else "overloaded")
            assert text == MEMORY_SHORT
            if not form.stream:
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
            assert older.text() == alone
            seam.before = nothing
            assert form.text(client.post(form.path, json=form.body(f"newest {MARK}", 3))) is not None


@pytest.mark.usefixtures("victim")
def test_choices_of_a_call_fail_together(exact_server: LiveServer, seam: Seam) -> None:
    """One choice that fails ends the call, and the others' blocks come back."""

    def second_choice(batch: Batch) -> None:
        if any(chunk.request_id.endswith("-1") and chunk.start > 40 for chunk in batch.chunks):
            raise broken()

    seam.before = second_choice
    for form in FORMS[4:]:
        with exact_server.client() as client:
            answer = client.post(form.path, json=form.body("a call of several choices", 400, n=3))
            assert told(form, answer) == ("server_error", STEP_FAILED)
        others_leave(exact_server)


def test_health_tries_a_token_after_a_failed_step(exact_server: LiveServer, seam: Seam) -> None:
    with exact_server.client() as client:
        assert client.get("/health").status_code == 200
        assert not seam.batches, "a good server needs no trial"
        seam.before = breaking(broken, 0)
        assert client.post("/generate", json=FORMS[0].body(MARK, 3)).status_code == 424
        seam.batches.clear()
        assert client.get("/health").status_code == 200
        assert [batch.num_tokens for batch in seam.batches] == [1]
        assert client.post("/generate", json=FORMS[0].body(MARK, 3)).status_code == 424

        def gone(batch: Batch) -> None:
            raise broken()

        seam.before = gone
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        seam.before = nothing
        assert client.get("/health").status_code == 200


@pytest.fixture
def fragile(tiny_folder: Path) -> Iterator[LiveServer]:
    """A server that a test may end."""
    server = LiveServer(tiny_folder, dtype="float32", max_running=2, step_timeout=0.6)
    yield server
    server.stop()


def test_a_stuck_step_is_told_to_everyone_and_to_health(fragile: LiveServer) -> None:
    release = threading.Event()
    seam = Seam.of(fragile.service.engine)
    seam.before = lambda batch: time.sleep(0.005)  # so that all are there before the first one ends
    try:
        calls = [RawCall(fragile, form, form.body("stuck", 300)) for form in STREAMS]
        waiting = Background(fragile, FORMS[0], FORMS[0].body("waits", 3))
        calls[0].read_events(3)
        wait_for(lambda: fragile.service.engine.num_requests == len(STREAMS) + 1)
        seam.before = lambda batch: release.wait(30) and None
        for call in calls:
            while data := call.socket.recv(4096):
                call.received += data
                if Fault.STUCK.value.encode() in call.received:
                    break
            assert Fault.STUCK.value.encode() in call.received
            call.socket.close()
        assert waiting.answer().status_code == 503
        assert waiting.answer().headers["retry-after"]
        with fragile.client() as client:
            wait_for(lambda: client.get("/health").status_code == 503)
            ready = client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "stuck")
            assert ready.json()["reason"] == Fault.STUCK.value
            for form in ALL_FORMS:
                answer = client.post(form.path, json=form.body("late", 3))
                assert answer.status_code == 503
                assert answer.headers["retry-after"]
        began = time.monotonic()
        fragile.stop()
        assert time.monotonic() - began < 5
    finally:
        release.set()


# Behind the engine


@pytest.mark.usefixtures("victim")
def test_a_token_that_becomes_no_text_fails_its_call_only(
    exact_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Detokenizer.push

    def failing(self: Detokenizer, token: int) -> str:
        if token == ord(MARK):
            raise ValueError(SECRET)
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", failing)
    with exact_server.client() as client:
        for form in ALL_FORMS:
            body = form.body("to no text", 200, logit_bias={str(ord(MARK)): 100})
            assert told(form, client.post(form.path, json=body))[1].endswith(TEXT_FAILED)
            others_leave(exact_server)


@pytest.mark.parametrize("form", STREAMS, ids=str)
def test_a_fault_of_a_route_leaves_nothing_behind(
    exact_server: LiveServer, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody foresaw ends a stream without its last event."""
    with exact_server.client() as client:  # the first stream of a server makes what is kept
        client.post(form.path, json=form.body("even", 1))
    exact_server.wait_until_idle()
    tasks = num_tasks(exact_server)
    written: list[object] = []

    def faulty(data: object) -> bytes:
        written.append(data)
        if len(written) > 5:
            raise LookupError(SECRET)
        return to_json(data)

    monkeypatch.setattr(delivery, "to_json", faulty)
    with exact_server.client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(form.path, json=form.body("odd", 400))
        exact_server.wait_until_idle(2)
        wait_for(lambda: num_tasks(exact_server) <= tasks)
        assert client.get("/health").status_code == 200


# Every pair of parameters


Axis = Sequence[dict[str, Any]]


def axis(name: str, *values: Any) -> Axis:
    """A parameter that is left out, or has one of these values."""
    return [{}, *({name: value} for value in values)]


NOTHING_MAY_COME = {str(token): -100 for token in range(260)}
COMMON = (
    axis("temperature", 0.01, 1.0),
    axis("top_k", 1, 10**9),
    axis("top_p", 0.01, 0.999),
    axis("typical_p", 0.01, 0.9),
    axis("min_p", 1.0, 1e-9),
    axis("repetition_penalty", 1e-9, 1e30),
    axis("frequency_penalty", -2.0, 2.0),
    axis("presence_penalty", -2.0, 2.0),
    axis("logit_bias", {"65": 100, "66": -100}, NOTHING_MAY_COME),
    axis("stop_token_ids", [65, 259]),
    axis("stop", ["a", "b"], ["é" * 100]),
    axis("ignore_eos", True),
)
GRAMMARS = {"regex": "[a-c]{2,9}", "json": {"type": "object"}}
NATIVE = (
    *COMMON,
    [{"max_new_tokens": 1}, {"max_new_tokens": 7}, {"max_new_tokens": 7, "min_tokens": 3}],
    [{}, {"do_sample": True}, {"do_sample": True, "seed": 2**63 - 1}],
    axis("truncate", 1),
    axis("return_full_text", True),
    [{}, {"details": True}, {"details": True, "top_n_tokens": 5}],
    axis("grammar", *({"type": kind, "value": value} for kind, value in GRAMMARS.items())),
)
STRUCTURES = ({"choice": ["yes", "no"]}, {"regex": "[a-c]{2,9}"}, {"json": {"type": "object"}})
OPENAI = (
    *COMMON,
    [{"max_tokens": 1}, {"max_tokens": 7}, {"max_tokens": 7, "min_tokens": 2}],
    axis("seed", 0, 2**63 - 1),
    axis("n", 3),
    [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}],
    [*axis("structured_outputs", *STRUCTURES), {"response_format": {"type": "json_object"}}],
)
TALK = [{"role": "user", "content": "a"}]
AXES: dict[str, Sequence[Axis]] = {
    "/generate": (
        *NATIVE,
        axis("decoder_input_details", True),
    ),
    "/generate_stream": NATIVE,
    "/v1/completions": (
        *OPENAI,
        [{"prompt": prompt} for prompt in ("a", ["a", "b"], [1, 2], [[1], [1]])],
        axis("echo", True),
        axis("logprobs", 0, 5),
    ),
    "/v1/chat/completions": (
        *OPENAI,
        [{"messages": TALK}, {"messages": TALK * 3}],
        [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}],
    ),
    "/v1/responses": (
        *COMMON,
        [{"input": "a", "max_output_tokens": tokens} for tokens in (1, 7)],
        axis("stream", True),
        axis("text", {"format": {"type": "json_object"}}),
    ),
    "/v1/messages": (
        *COMMON[:-2],
        [{"messages": TALK, "max_tokens": tokens} for tokens in (1, 7)],
        axis("stream", True),
        axis("stop_sequences", ["a", "b"]),
    ),
}


def pairwise(axes: Sequence[Axis], seed: int) -> list[dict[str, Any]]:
    """Rows in which every two values of every two axes meet; each is the best of some random ones."""
    random = Random(seed)
    cells = [[(place, index) for index in range(len(axis))] for place, axis in enumerate(axes)]
    pairs = {pair for two in itertools.combinations(cells, 2) for pair in itertools.product(*two)}
    rows = []
    while pairs:
        wanted = dict(min(pairs))
        tries = [
            [(place, wanted.get(place, random.randrange(len(axis)))) for place, axis in enumerate(axes)]
            for _ in range(20)
        ]
        row = max(tries, key=lambda row: len(pairs.intersection(itertools.combinations(row, 2))))
        pairs -= set(itertools.combinations(row, 2))
        rows.append({name: value for place, index in row for name, value in axes[place][index].items()})
    return rows


def ends_well(answer: httpx.Response) -> bool:
    """Whether a call was served; a grammar that the other parameters contradict is no fault."""
    failures = re.findall(r'"(?:error|message)":\s?"([^"]+)"', answer.text)
    if not failures:
        return answer.status_code == 200
    return bool(failures[0].endswith((MASK_FAILED, NOTHING_ALLOWED)))


@pytest.mark.parametrize("path", AXES)
def test_no_pair_of_parameters_fails_anyone(exact_server: LiveServer, alone: str, path: str) -> None:
    """Every call is served, beside a stream whose text stays what it is alone."""
    rows = pairwise(AXES[path], seed=1)
    bodies = [{"inputs": "a", "parameters": row} if path[1] == "g" else row for row in rows]

    async def send() -> tuple[list[httpx.Response], list[str]]:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(base_url=exact_server.url, timeout=120, limits=limits) as client:
            done = asyncio.Event()

            async def watch() -> list[str]:
                texts = []
                while not done.is_set():
                    answer = await client.post(VICTIM.path, json=VICTIM.body("victim", 100))
                    texts.append(VICTIM.text(answer))
                return texts

            watcher = asyncio.create_task(watch())
            answers = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
            done.set()
            return answers, await watcher

    answers, texts = asyncio.run(send())
    assert texts and set(texts) == {alone}
    bad = [(row, a.text) for row, a in zip(rows, answers, strict=True) if not ends_well(a)]
    assert not bad, (len(bad), bad[0])
    assert [answer.status_code for answer in answers].count(200) > len(rows) / 2
    with exact_server.client() as client:
        assert client.get("/health").status_code == 200
    exact_server.wait_until_idle()
    exact_server.service.engine._scheduler.check()
