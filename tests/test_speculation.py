"""Several tokens a step: the guesses, how many of them pay, and that they change nothing but the speed."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BOS, VOCAB_SIZE, byte_tokenizer, make_llama
from harness import OP_SETS, Tiny, make_ops
from live import LiveServer
from rich.console import Console
from wire import ALL_FORMS, Form, metric, native_events, script_llama

from model.batch import SamplingParams, Token
from model.errors import ModelError
from model.loader import make_runner
from server.config import ServeSettings
from server.engine.block_pool import BlockPool
from server.engine.block_tables import BlockTables
from server.engine.draft_model import DraftModel
from server.engine.prompt_lookup import LONG, SHORT, PromptLookup
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.request import Sequence as Running
from server.engine.speculator import (
    FAILURES,
    LOOKS,
    MOST_GUESSES,
    STEPS_BEFORE_A_LOOK,
    Proposer,
    Speculator,
)
from server.phases import Phases
from server.startup import make_speculator
from server.text.tokenizer import Tokenizer

Guesses = Mapping[Running, tuple[int, ...]]


def running(prompt: Sequence[int], max_tokens: int = 10_000) -> Running:
    """A sequence that decodes its first token."""
    sequence = Running(Request("one", tuple(prompt), SamplingParams(), max_tokens))
    sequence.num_computed = len(prompt) - 1
    return sequence


# -- prompt lookup --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "guesses"),
    [
        ("", 3, ""),
        ("abcdefgh", 3, ""),  # nothing came before
        ("abcdeXab", 3, "cde"),  # two tokens are enough
        ("a.b.c.a", 3, ""),  # one is not
        ("abcdeXbcdeYabcd", 2, "eX"),  # the last place of the longer match, not of the shorter one
        ("abcde1 cd2 abcd", 2, "e1"),
        ("ab1 ab2 ab", 2, "2 "),  # the last place
        ("ababab", 5, "ababa"),  # round and round
        ("xaaaa", 4, "aaaa"),
    ],
)
def test_what_followed_the_same_tokens_before(text: str, count: int, guesses: str) -> None:
    lookup, sequence = PromptLookup(count), running((1, *text.encode()))
    (chances,) = lookup.chances([sequence])
    assert len(chances) == (count if guesses else 0)
    if chances:
        assert bytes(lookup.guess({sequence: count})[sequence]).decode() == guesses


def test_a_text_that_grows_is_followed() -> None:
    """A match is real and the longer ones win; whatever ends as something before it is seen to do so."""
    random.seed(5)
    for alphabet in (2, 5, 30):
        lookup, sequence = PromptLookup(4), running([0] * 6)
        for _ in range(400):
            (chances,) = lookup.chances([sequence])
            text = sequence.token_ids
            earlier = [text[i : i + SHORT] for i in range(1, len(text) - SHORT)]
            assert bool(chances) == (text[-SHORT:] in earlier)
            if chances:
                (guesses,) = lookup.guess({sequence: 1}).values()
                around = [text[i : i + LONG + 1] for i in range(1, len(text) - LONG)]
                matches = [part[-1] for part in around if part[:-1] == text[-LONG:]]
                assert not matches or guesses[0] in matches
            sequence.token_ids.append(random.randrange(alphabet))
    assert lookup.chances([]) == [] and not lookup._texts, "who is gone is forgotten"


def test_nothing_is_guessed_beyond_the_end() -> None:
    lookup = PromptLookup(8)
    sequence = running(b"abababab", max_tokens=4)
    assert len(lookup.chances([sequence])[0]) == 3, "of four tokens the last needs no guess"
    sequence.token_ids += b"aba"
    assert lookup.chances([sequence]) == [[]]


# -- how many guesses pay -------------------------------------------------------------------------------

MEMORY_BOUND: Callable[[int], float] = lambda rows: 3.4 + 0.1 * rows  # noqa: E731
NATIVE: Callable[[int], float] = lambda rows: 2.4 + 0.9 * rows  # noqa: E731
COMPUTE_BOUND: Callable[[int], float] = lambda rows: 1.0 * rows  # noqa: E731
STAIRS: Callable[[int], float] = lambda rows: 4.0 * -(-rows // 8)  # noqa: E731
MACHINES = {"memory": MEMORY_BOUND, "native": NATIVE, "compute": COMPUTE_BOUND, "stairs": STAIRS}
"""What a step of so many rows takes."""


def speed(machine: Callable[[int], float], batch: int, alphabet: int, noise: float, proposer: bool) -> float:
    """Tokens a second, where time is what a machine says, the more the longer the texts are.

    A text is drawn from an alphabet, or repeats itself for ever if that is 0. After 300 tokens another one
    comes in its place.
    """
    chance = random.Random(batch)
    speculator = Speculator(PromptLookup(8) if proposer else None)
    circle = [chance.randrange(1000) for _ in range(40)]
    prompt = range(7) if alphabet else circle * 3
    sequences = [running(prompt) for _ in range(batch)]
    tokens, seconds = 0, 0.0
    while tokens < 600 * batch:
        guesses = speculator.guesses(sequences)
        rows = sum(map(len, guesses.values()))
        assert rows <= MOST_GUESSES
        length = sum(len(sequence.token_ids) for sequence in sequences) / batch
        took = machine(batch + rows) * chance.uniform(1 - noise, 1 + noise) * (1 + length / 1000)
        speculator.record(batch, rows, took)
        seconds += took
        for index, sequence in enumerate(sequences):
            text = sequence.token_ids
            for guess in (*guesses.get(sequence, ()), None):
                text.append(chance.randrange(alphabet) if alphabet else circle[len(text) % 40])
                tokens += 1
                if text[-1] != guess:
                    break
            if sequence.num_output > 300 + index * 9:
                sequences[index] = running(prompt)
    return tokens / seconds


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("name", MACHINES)
def test_guesses_never_cost_much_and_gain_where_they_can(name: str, batch: int, noise: float) -> None:
    machine = MACHINES[name]

    def ratio(alphabet: int) -> float:
        return speed(machine, batch, alphabet, noise, True) / speed(machine, batch, alphabet, noise, False)

    # Of 30 letters two that came before come soon, of 5 always, and what follows is chance.
    assert ratio(30) > 0.97 and ratio(5) > 0.97
    ideal = max(
        (batch + count) / batch / (machine(batch + count) / machine(batch))
        for count in range(min(8 * batch, MOST_GUESSES) + 1)
    )
    assert ratio(0) > 1 + 0.5 * (ideal - 1) - 0.05


class Broken:
    """A proposer that fails so many times, and then is sure of what it says."""

    name, computes = "broken", False

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def chances(self, sequences: Sequence[Running]) -> list[list[float]]:
        self.asked += 1
        if self.asked <= self.times:
            raise RuntimeError("no guess")
        return [[1.0] for _ in sequences]

    def guess(self, counts: dict[Running, int]) -> dict[Running, tuple[int, ...]]:
        return dict.fromkeys(counts, (7,))


@pytest.mark.parametrize("times", [FAILURES - 1, FAILURES])
def test_a_failure_costs_guesses_only(times: int) -> None:
    proposer, sequence = Broken(times), running([1, 2, 3])
    speculator = Speculator(proposer)
    for _ in range(times):
        assert speculator.guesses([sequence]) == {}
    for _ in range(LOOKS):
        speculator.record(1, 0, 1.0)
    asked = times < FAILURES
    assert speculator.guesses([sequence]) == ({sequence: (7,)} if asked else {})
    assert proposer.asked == times + asked, "one that always fails is not asked for ever"


def test_other_sequences_are_looked_at_without_guesses_first() -> None:
    """Their texts may be longer or shorter, so that their steps tell nothing of the others'."""
    one, two = running([1, 2, 3]), running([4, 5, 6])
    speculator = Speculator(Broken(0))
    for decoding in ([one], [two], [one, two], [one, two]):
        for _ in range(LOOKS * (decoding != speculator._decoding)):
            assert speculator.guesses(decoding) == {}
            speculator.record(len(decoding), 0, 1.0)
        assert speculator.guesses(decoding) == dict.fromkeys(decoding, (7,))
    for _ in range(STEPS_BEFORE_A_LOOK):
        assert speculator.guesses([one, two])
        speculator.record(2, 2, 1.1)
    assert speculator.guesses([one, two]) == {}, "they have grown"


# -- the same output ------------------------------------------------------------------------------------

REPEATING = [*b"one two three, one two three, one two thr"]
OTHER = [*b"Nothing here was said before."]
LONGER = [BOS, *b"the quick brown fox jumps over the lazy dog and the quick brown fox sleeps "]


def requests() -> dict[str, dict[str, Any]]:
    """What may depend on the history, on the place in the output, or on how the output ends."""
    plain = SamplingParams(logprobs=3)
    drawn = SamplingParams(1.0, seed=3, logprobs=1)
    return {
        "greedy": {"prompt": REPEATING, "params": plain, "max_tokens": 30},
        "other": {"prompt": OTHER, "params": plain, "max_tokens": 25},
        "scored": {"prompt": LONGER, "params": SamplingParams(prompt_logprobs=2), "max_tokens": 9},
        "drawn": {"prompt": REPEATING, "params": drawn, "max_tokens": 30},
        "fork": {"prompt": REPEATING, "params": replace(drawn, seed=4), "max_tokens": 30, "fork_of": "drawn"},
        "cut": {"prompt": OTHER, "params": SamplingParams(0.9, 40, 0.9, seed=8), "max_tokens": 20},
        "again": {"prompt": LONGER, "params": SamplingParams(repetition_penalty=1.4), "max_tokens": 20},
        "less": {"prompt": LONGER, "params": SamplingParams(frequency_penalty=3.0), "max_tokens": 20},
        "new": {"prompt": LONGER, "params": SamplingParams(1.0, presence_penalty=2.0), "max_tokens": 20},
        "biased": {
            "prompt": OTHER,
            "params": SamplingParams(logit_bias=((65, 4.0), (66, 4.0))),
            "max_tokens": 9,
        },
        "one": {"prompt": OTHER, "params": plain, "max_tokens": 1},
        "none": {"prompt": OTHER, "params": SamplingParams(prompt_logprobs=0), "max_tokens": 0},
        "held": {"prompt": OTHER, "params": plain, "max_tokens": 9, "constraint": Even()},
    }


class Even:
    """A constraint that lets even tokens come only, and sees every one."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> bytes:
        return b"\x55" * 32

    def advance(self, token_id: int) -> bool:
        self.seen.append(token_id)
        return len(self.seen) == 5


@dataclass(frozen=True)
class Told:
    """A request's output, however its prompt was divided into chunks."""

    prompt: list[Token]
    tokens: list[Token]
    end: tuple[FinishReason | None, str | None]

    @classmethod
    def of(cls, outputs: list[TokenOutput]) -> "Told":
        assert all(output.finish_reason is None for output in outputs[:-1])
        return cls(
            [token for output in outputs for token in output.prompt_tokens],
            [output.token for output in outputs if output.token],
            (outputs[-1].finish_reason, outputs[-1].error),
        )

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def same(self, other: "Told", tolerance: float) -> bool:
        """Whether all is equal but for the rounding of logarithms."""
        if self.end != other.end or self.ids != other.ids or len(self.prompt) != len(other.prompt):
            return False
        pairs = zip(self.prompt + self.tokens, other.prompt + other.tokens, strict=True)
        return all(
            (one.id, [id for id, _ in one.top]) == (two.id, [id for id, _ in two.top])
            and (one.logprob or 0) == pytest.approx(two.logprob or 0, abs=tolerance)
            for one, two in pairs
        )


ENDS = {"ended": 7, "stopped": 5, "late": 11}
"""Requests that end by the token that comes at this place, which is known from a run before."""


def run(tiny: Tiny, guess: Callable[[list[Running]], Guesses] | None, **options: Any) -> dict[str, Told]:
    """What each request is told."""
    drive = tiny.drive(poison=77.0, guesses=60, **options)
    drive.guess = guess or drive.guess
    given = requests()
    greedy = tiny.drive()
    known = greedy.add("greedy", REPEATING, 30)
    greedy.run()
    ends = {name: known.tokens[place] for name, place in ENDS.items()}
    given["ended"] = {"prompt": REPEATING, "max_tokens": 30, "eos_ids": [ends["ended"]]}
    given["stopped"] = {"prompt": REPEATING, "max_tokens": 30, "stop_ids": frozenset([ends["stopped"]])}
    late = SamplingParams(min_tokens=15, ending_ids=frozenset([ends["late"]]), logprobs=2)
    given["late"] = {"prompt": REPEATING, "params": late, "max_tokens": 30, "eos_ids": [ends["late"]]}
    for name, fields in given.items():
        drive.add(name, **fields)
        drive.step()
    drive.run()
    assert all(trace.done for trace in drive.traces.values())
    assert bool(drive.scheduler.stats.preemptions) == ("blocks" in options)
    return {name: Told.of(trace.outputs) for name, trace in drive.traces.items()}


class Oracle:
    """Guesses what another run gave, at random places something else, and counts what comes true."""

    def __init__(self, told: Mapping[str, Told], seed: int) -> None:
        self.told = told
        self.random = random.Random(seed)
        self.guessed = 0

    def __call__(self, decoding: list[Running]) -> Guesses:
        guesses = {}
        for one in decoding:
            most = min(one.most_guesses, self.random.randrange(8), 60 // len(decoding))
            next_tokens = self.told[one.request.id].ids[one.num_output :][:most]
            wrong = [self.random.random() < 0.2 for _ in next_tokens]
            next_tokens += [9] * (most - len(next_tokens))  # beyond an end that the sequence does not know of
            guesses[one] = tuple(t ^ w for t, w in zip_longest(next_tokens, wrong, fillvalue=0))
            self.guessed += len(guesses[one])
        return {one: tokens for one, tokens in guesses.items() if tokens}


def asking(proposer: Proposer) -> Callable[[list[Running]], Guesses]:
    """Always as many guesses as may be, so that what is shown does not depend on time."""

    def guess(decoding: list[Running]) -> Guesses:
        chances = zip(decoding, proposer.chances(decoding), strict=True)
        counts = {one: min(len(own), 60 // len(decoding)) for one, own in chances if own}
        guesses = proposer.guess(counts)
        assert all(len(tokens) <= counts[one] for one, tokens in guesses.items())
        return guesses

    return guess


SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small chunks": {"budget": 20, "max_running": 6},
    "preemption": {"blocks": 16, "max_running": 6, "budget": 64},
    "no prefixes": {"prefix_cache": False, "shuffle_blocks": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_output_is_the_same(any_tiny: Tiny, setting: str) -> None:
    """Ids, log-probabilities, ends and the order of events; to the last bit on the native kernels."""
    expected = run(any_tiny, None, **SETTINGS[setting])
    oracle = Oracle(expected, seed=1)
    for guess in (oracle, asking(PromptLookup(5))):
        told = run(any_tiny, guess, **SETTINGS[setting])
        for name, outputs in expected.items():
            exact = any_tiny.op_set != "torch"
            assert told[name].same(outputs, 0.0 if exact else 2e-4), (name, told[name], outputs)
    assert oracle.guessed > 100


def test_a_window_keeps_what_rejected_rows_need(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    make_llama(tmp_path, tie=True, head_dim=32, window=24, seed=6)
    for op_set in ("torch", "avx2"):
        tiny = Tiny(tmp_path, op_set=op_set)
        expected = run(tiny, None)
        told = run(tiny, Oracle(expected, seed=2))
        for name in expected:
            assert told[name].ids == expected[name].ids, name


def test_several_tokens_come_in_a_step(any_tiny: Tiny) -> None:
    expected = any_tiny.drive()
    trace = expected.add("one", OTHER, 24)
    expected.run()
    drive = any_tiny.drive(guesses=60)
    drive.guess = lambda decoding: {
        one: tuple(trace.tokens[one.num_output :][: min(7, one.most_guesses)])
        for one in decoding
        if one.most_guesses
    }
    assert drive.add("one", OTHER, 24).tokens == []
    drive.run()
    assert drive.traces["one"].tokens == trace.tokens
    assert len(drive.batches) == 1 + 3, "a prefill, then 8 tokens a step, the last one with 7"


def test_prompts_get_rows_beside_guesses(tiny: Tiny) -> None:
    """Guesses take half of the rows that decodes leave while a prompt waits, and none of its share."""
    drive = tiny.drive(budget=30, guesses=60)
    drive.guess = lambda decoding: dict.fromkeys(decoding, (1,) * 25)
    drive.add("one", OTHER, 100)
    drive.step()
    drive.add("two", LONGER, 4)
    drive.step()
    assert [(chunk.count, chunk.guesses) for chunk in drive.batches[-1].chunks] == [(15, 14), (15, 0)]
    batch = drive.scheduler.schedule(3, {drive.scheduler.decoding[0]: (1,) * 25})
    assert batch is not None
    assert [(chunk.count, chunk.guesses) for chunk in batch.chunks] == [(15, 14), (3, 0)]


def test_the_distribution_is_the_models(tmp_path: Path) -> None:
    """Third tokens over many seeds, chosen behind guesses, against their exact probability (chi-square)."""
    make_llama(tmp_path, tie=True, vocab_size=8, seed=3)
    tiny = Tiny(tmp_path)
    prompt, size, draws = (3, 1, 2, 5), 8, 800
    before = list(product(range(size), repeat=2))
    contexts = torch.tensor([(*prompt, *tokens) for tokens in before])
    with torch.no_grad():
        chances = tiny.reference(contexts).logits[:, len(prompt) - 1 :].softmax(-1).double()
    one, two = contexts[:, -2, None], contexts[:, -1, None]
    paths = chances[:, 0].gather(-1, one) * chances[:, 1].gather(-1, two)
    expected = (paths * chances[:, 2]).sum(0) * draws  # [size]
    likeliest = [int(chances[:, 0].mean(0).argmax()), int(expected.argmax()), int(expected.argmax())]
    drive = tiny.drive(budget=256, guesses=60)
    guesses = accepted = 0

    def guess(decoding: list[Running]) -> Guesses:
        # The first of them stands at the first place that a decode chooses.
        return {one: tuple(likeliest[one.num_output :][: one.most_guesses]) for one in decoding[:30]}

    drive.guess = guess
    for seed in range(draws):
        drive.add(f"{seed}", prompt, 4, params=SamplingParams(1.0, seed=seed))
    drive.run()
    guesses = sum(batch.num_guesses for batch in drive.batches)
    accepted = sum(len(trace.tokens) for trace in drive.traces.values())
    assert guesses > draws / 2 and accepted == 4 * draws
    found = torch.bincount(torch.tensor([trace.tokens[2] for trace in drive.traces.values()]), minlength=size)
    statistic = float(((found - expected) ** 2 / expected).sum())
    assert expected.min() > 5 and statistic < 24.3, "99.9 % of chi-square with 7 degrees of freedom"


# -- a draft model --------------------------------------------------------------------------------------


def draft_of(tiny: Tiny, most: int = 5, blocks: int = 256, rows: int = 512, **more: Any) -> DraftModel:
    """A draft model with a cache of its own."""
    runner = make_runner(tiny.model, [blocks] * len(tiny.config.cache_groups), rows, 64)
    cache = runner.graph.cache
    pools = [BlockPool(blocks, cache.block_size, window=group.window) for group in cache.groups]
    limits = {"max_length": 512, "vocab_size": tiny.config.vocab_size} | more
    return DraftModel(runner, BlockTables(pools, most_rows=rows), most=most, rows=rows, **limits)


@pytest.fixture(scope="module")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A smaller model with a window that knows the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    byte_tokenizer(folder)
    make_llama(folder, tie=True, layers=1, window=20, seed=9)
    return Tiny(folder)


@pytest.mark.parametrize(
    "settings", [{}, {"blocks": 9}, {"rows": 8}, {"max_length": 50}, {"vocab_size": 200}]
)
def test_a_draft_model_changes_nothing(tiny: Tiny, other_tiny: Tiny, settings: dict[str, int]) -> None:
    """Whatever it guesses, however little memory, rows or length it has."""
    expected = run(tiny, None, budget=64)
    draft = draft_of(other_tiny, **settings)
    ask = asking(draft)

    def guess(decoding: list[Running]) -> Guesses:
        guesses = ask(decoding)
        for one, tokens in guesses.items():
            assert max(tokens) < settings.get("vocab_size", VOCAB_SIZE)
            assert len(one.token_ids) + len(tokens) <= settings.get("max_length", 512)
        return guesses

    told = run(tiny, guess, budget=64)
    for name in expected:
        assert told[name].same(expected[name], 2e-4), name
    draft.chances([])
    assert draft._tables.num_used == 0, "its blocks come back"
    draft._tables.check([])


def test_a_draft_that_is_the_model_is_right(any_tiny: Tiny) -> None:
    """Its cache stays in step after guesses that came true, after a few of them, and after wrong ones."""
    known = any_tiny.drive()
    trace = known.add("one", OTHER, 40)
    known.run()
    drive, draft = any_tiny.drive(guesses=60), draft_of(any_tiny, rows=16)
    ask, made = asking(draft), []

    def guess(decoding: list[Running]) -> Guesses:
        guesses = ask(decoding)
        made.extend((one.num_output, tokens) for one, tokens in guesses.items())
        # Sometimes only the first one is let through, or another token is said than the draft's.
        if len(made) % 3 == 0:
            return {one: (tokens[0] ^ 1, *tokens[1:]) for one, tokens in guesses.items()}
        return {one: tokens[: len(made) % 3 * 2] for one, tokens in guesses.items()}

    drive.guess = guess
    assert not drive.add("one", OTHER, 40).done
    drive.run()
    assert drive.traces["one"].tokens == trace.tokens
    assert made and all(tokens == tuple(trace.tokens[n : n + len(tokens)]) for n, tokens in made)
    assert len(made) > 9 and sum(len(tokens) == 5 for _, tokens in made) > len(made) / 2
    assert draft.chances([]) == [] and draft._chance > 0.7


def test_a_draft_falls_behind_and_catches_up(tiny: Tiny) -> None:
    draft = draft_of(tiny, rows=10)
    first, second = running(LONGER), running(OTHER)
    assert all(draft.chances([first, second]))
    assert draft.guess({first: 3}) == {}, "it has computed 10 tokens"
    assert draft.guess({second: 3, first: 3}) == {}
    for _ in range(len(LONGER) // 10):
        draft.chances([first, second])
        guesses = draft.guess({first: 3})
    assert len(guesses[first]) == 3


# -- served ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def round_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the same words for ever."""
    folder = tmp_path_factory.mktemp("round")
    text = b"abcdefghij "
    script_llama(folder, *pairwise(text + text[:1]))
    return folder


SPECULATING = ("prompt-lookup", "draft-model")


@pytest.fixture(scope="module", params=SPECULATING)
def speculating(
    request: pytest.FixtureRequest, serve: Callable[..., LiveServer], round_folder: Path
) -> LiveServer:
    """A live server that guesses ahead, the draft being the model itself."""
    own = (
        {"speculate": request.param}
        if request.param == "prompt-lookup"
        else {"draft_model": str(round_folder)}
    )
    return serve(round_folder, dtype="float32", **own)


def counted(server: LiveServer, what: str) -> float:
    return sum(metric(server, f"speculative_{what}_tokens_total", proposer=kind) for kind in SPECULATING)


@pytest.mark.parametrize("op_set", OP_SETS)
def test_who_guesses_by_default(op_set: str, round_folder: Path) -> None:
    """Where a row's bits are the same with guesses beside it, and where it was asked for."""
    ops = make_ops(op_set)
    tokenizer = Tokenizer.from_folder(round_folder, frozenset())

    def name(**settings: str) -> str:
        given = ServeSettings(**settings)
        return make_speculator(given, tokenizer, ops, 100, Console(quiet=True), Phases()).name

    assert name() == ("" if op_set == "torch" else "prompt-lookup")
    assert name(speculate="off") == ""
    assert name(speculate="prompt-lookup") == "prompt-lookup"


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_a_client_sees_the_same(speculating: LiveServer, form: Form) -> None:
    text = ("abcdefghij " * 20)[1:151]
    with speculating.client() as client:
        answer = client.post(form.path, json=form.body("abcdefghij a", 150))
    if "chat" not in form.path and form.path not in ("/v1/messages", "/v1/responses"):
        assert form.text(answer) == text
    if form.stream and not form.is_openai:
        events = native_events(answer.text)
        assert [event["token"]["text"] for event in events] == [*text], "one token, one event"
        assert [event["generated_text"] for event in events[:-1]] == [None] * 149
    speculating.wait_until_idle()


def skipped(server: LiveServer) -> float:
    """As TGI counts them."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("tgi_request_skipped_tokens_sum"))


def test_what_was_guessed_is_counted(speculating: LiveServer) -> None:
    before_tgi = skipped(speculating)
    before = {what: counted(speculating, what) for what in ("proposed", "accepted")}
    steps = metric(speculating, "step_seconds_count")
    form = ALL_FORMS[0]
    with speculating.client() as client:
        body = form.body("abcdefghij abcde", 400, stop=["no such text"])
        assert len(form.text(client.post(form.path, json=body))) == 400
    speculating.wait_until_idle()
    proposed, accepted = (counted(speculating, what) - before[what] for what in ("proposed", "accepted"))
    assert proposed >= accepted > 100
    assert accepted > 0.9 * proposed, "the text is what was guessed"
    steps = metric(speculating, "step_seconds_count") - steps
    assert steps == 400 - accepted, "each saved a step"
    assert skipped(speculating) - before_tgi == accepted


def test_a_stop_within_what_was_guessed(speculating: LiveServer) -> None:
    """Nothing comes after it, and its blocks come back."""
    with speculating.client() as client:
        parameters = {"max_new_tokens": 300, "stop": ["def"], "details": True}
        said = client.post("/generate", json={"inputs": "abcdefghij a", "parameters": parameters}).json()
    assert said["generated_text"] == "bcdef" and said["details"]["generated_tokens"] == 5
    speculating.wait_until_idle()


def test_a_draft_of_another_vocabulary_is_refused(
    round_folder: Path, tmp_path: Path, serve: Callable[..., LiveServer]
) -> None:
    larger, other = tmp_path / "larger", tmp_path / "other"
    byte_tokenizer(larger, VOCAB_SIZE + 1)
    make_llama(larger, tie=True, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(
        ModelError, match=rf"--draft-model {larger}: it has 261 tokens, and the served .* 260; "
    ):
        serve(round_folder, dtype="float32", draft_model=str(larger))
    byte_tokenizer(other)
    make_llama(other, tie=True)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with pytest.raises(ModelError, match=r"it has another token 258 \(b'<\|im_begin\|>'\) than the served"):
        serve(round_folder, dtype="float32", draft_model=str(other))
    with pytest.raises(ValueError, match="give one of them"):
        ServeSettings(speculate="prompt-lookup", draft_model=str(round_folder))
