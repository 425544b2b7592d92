"""Admission: places and waiting tokens are bounded, count as what they cost, and are kept for newcomers."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from live import LiveServer
from wire import FORMS, Background, Form, RawCall, metric, wait_for

from model.batch import SamplingParams
from server.engine.admission import Admission, Overloaded
from server.engine.request import Request

pytestmark = pytest.mark.alone

ANSWER = Form("/generate", False)
COUNT = itertools.count()


def requests_of(client: str, *lengths: int, fork_of: str | None = None) -> list[Request]:
    return [
        Request(f"{next(COUNT)}", (1,) * length, SamplingParams(), 5, client=client, fork_of=fork_of)
        for length in lengths
    ]


class TestBooks:
    def test_places(self) -> None:
        admission = Admission(max_running=2, max_waiting=3, max_waiting_tokens=1000)
        first = requests_of("a", 1, 1, 1)
        admission.admit(first)
        with pytest.raises(Overloaded, match="3 of 5 places"):
            admission.admit(requests_of("a", 1, 1, 1))
        admission.admit(requests_of("a", 1, 1))
        with pytest.raises(Overloaded):
            admission.admit(requests_of("b", 1))
        admission.leave(first[0])
        admission.admit(requests_of("b", 1))

    def test_tokens_count_until_the_prompt_is_computed(self) -> None:
        admission = Admission(max_running=8, max_waiting=8, max_waiting_tokens=100)
        first, second = requests_of("a", 60, 20)
        admission.admit([first, second])
        with pytest.raises(Overloaded, match="80 of 88 prompt tokens"):
            admission.admit(requests_of("a", 10))
        admission.start(first.id)
        admission.start(first.id)
        assert admission.waiting_tokens == 20
        admission.admit(requests_of("a", 10))
        admission.leave(first)
        admission.leave(second)
        assert admission.waiting_tokens == 10

    def test_a_prompt_beyond_the_bound_goes_alone(self) -> None:
        admission = Admission(max_running=8, max_waiting=8, max_waiting_tokens=100)
        admission.admit(requests_of("a", 500))
        with pytest.raises(Overloaded):
            admission.admit(requests_of("b", 1))

    def test_a_fork_costs_a_place_and_one_token(self) -> None:
        admission = Admission(max_running=8, max_waiting=0, max_waiting_tokens=100)
        leader = requests_of("a", 50)
        admission.admit(leader + requests_of("a", *[50] * 7, fork_of=leader[0].id))
        assert admission.waiting_tokens == 57
        with pytest.raises(Overloaded, match="8 of 8 places"):
            admission.check("b")

    def test_the_last_places_are_for_those_who_have_none(self) -> None:
        admission = Admission(max_running=4, max_waiting=16, max_waiting_tokens=1000)
        flood = requests_of("a", *[1] * 18)
        admission.admit(flood)
        with pytest.raises(Overloaded, match="18 of 18 places"):
            admission.check("a")
        newcomer = requests_of("b", 1)
        admission.admit(newcomer)
        with pytest.raises(Overloaded):
            admission.check("b")  # it has one by now
        admission.admit(requests_of("c", 1))
        with pytest.raises(Overloaded, match="20 of 20 places"):
            admission.check("d")

    def test_the_last_tokens_too(self) -> None:
        admission = Admission(max_running=4, max_waiting=16, max_waiting_tokens=800)
        admission.admit(requests_of("a", 700))
        with pytest.raises(Overloaded, match="700 of 700 prompt tokens"):
            admission.check("a")
        admission.check("b", tokens=100)

    def test_nothing_is_kept_of_clients_that_left(self) -> None:
        admission = Admission(max_running=4, max_waiting=16, max_waiting_tokens=800)
        for client in range(1000):
            admission.admit(gone := requests_of(f"{client}", 3))
            admission.leave(gone[0])
        assert not admission._clients
        assert not admission._waiting
        assert admission.waiting_tokens == 0


@pytest.fixture(scope="module")
def narrow(serve: Callable[..., LiveServer], long_folder: Path) -> LiveServer:
    """A server with one place to run, eight to wait and room for 200 waiting tokens."""
    return serve(
        long_folder, dtype="float32", max_running=1, max_waiting=8, max_waiting_tokens=200, prefix_cache=False
    )


@pytest.fixture
def busy(narrow: LiveServer) -> Iterator[LiveServer]:
    """The same while a stream runs that does not end by itself."""
    narrow.wait_until_idle()
    with RawCall(narrow, FORMS[1], FORMS[1].body("x", 4000)) as call:
        call.read_events(1)
        yield narrow
        call.leave()
    narrow.wait_until_idle()
    assert metric(narrow, "waiting_prompt_tokens") == 0


def refused(client: httpx.Client, form: Form, body: dict[str, object]) -> bool:
    """Whether a call is refused, at once and in the proper form; it must not be served."""
    started = time.perf_counter()
    answer = client.post(form.path, json=body)
    assert time.perf_counter() - started < 0.1
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_waiting_tokens_are_bounded(busy: LiveServer, form: Form) -> None:
    rejected = metric(busy, "rejections_total", reason="overloaded")
    with busy.client() as client, RawCall(busy, ANSWER, ANSWER.body("w" * 150, 5)):
        wait_for(lambda: busy.stats.waiting == 1)
        client.get("/health")
        assert refused(client, form, form.body("t" * 100, 5))
        assert busy.service.engine.num_requests == 2
        assert metric(busy, "waiting_prompt_tokens") >= 150
    assert metric(busy, "rejections_total", reason="overloaded") == rejected + 1


def test_a_flood_of_one_client_leaves_a_place_for_others(busy: LiveServer) -> None:
    with busy.client() as client:
        flood = [RawCall(busy, ANSWER, ANSWER.body("f", 2)) for _ in range(7)]
        wait_for(lambda: busy.stats.waiting == 7)
        assert refused(client, ANSWER, ANSWER.body("g", 2))
        other = RawCall(busy, ANSWER, ANSWER.body("h", 2), address="127.0.0.2")
        wait_for(lambda: busy.stats.waiting == 8)  # admitted: it waits for its turn
        for call in [*flood, other]:
            call.leave()


def test_the_choices_of_a_call_cost_places(busy: LiveServer) -> None:
    form = FORMS[4]
    with busy.client() as client, RawCall(busy, ANSWER, ANSWER.body("w", 5)):
        wait_for(lambda: busy.stats.waiting == 1)
        assert refused(client, form, form.body("n", 2, n=7))
        assert refused(client, form, form.body("n", 2) | {"prompt": ["p"] * 7})
        assert refused(client, Form("/v1/completions", False), form.body("b", 2, best_of=7, n=1))
        call = Background(busy, form, form.body("n", 2, n=6))
        wait_for(lambda: busy.stats.waiting == 7)
        assert len(call.answer().json()["choices"]) == 6


def test_a_call_that_never_fits_is_told_the_numbers(narrow: LiveServer) -> None:
    narrow.wait_until_idle()
    with narrow.client() as client:
        answer = client.post("/v1/completions", json=FORMS[4].body("n", 2, n=10))
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "10" in message and "9" in message
        answer = client.post("/generate", json=ANSWER.body("x" * 5000, 2))
        assert answer.status_code == 422
        assert "4096" in answer.json()["error"]


def test_a_full_server_refuses_before_it_reads_the_prompt(busy: LiveServer) -> None:
    """The largest body that is taken costs nothing but its transport."""
    with busy.client() as client:
        calls = [RawCall(busy, ANSWER, ANSWER.body("f", 2)) for _ in range(7)]
        wait_for(lambda: busy.stats.waiting == 7)
        client.get("/health")
        assert refused(client, ANSWER, ANSWER.body("long " * 380_000, 2))
        for call in calls:
            call.leave()
