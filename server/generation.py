"""From a validated prompt to text: the one path that every dialect streams or collects.

Submits to the engine, turns tokens into text deltas, finds stop strings, and gives the blocks back
whatever happens. Knows no wire format.
"""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from model.batch import SamplingParams, Token
from server.caller import Caller, Course
from server.engine.admission import Overloaded
from server.engine.engine import Engine, Stopped
from server.engine.request import FinishReason, Request
from server.errors import GENERATION, OVERLOADED, UNAVAILABLE, Kind, RequestError, overloaded
from server.metrics import Metrics
from server.metrics_tgi import Timings
from server.text.detokenizer import Detokenizer
from server.text.grammar import Grammar
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer

logger = logging.getLogger("rivulet.generation")

TEXT_FAILED = "the tokens could not be turned into text"


class Finish(Enum):
    """Why a text ended; each dialect has its own word for it."""

    EOS = "eos"
    LENGTH = "length"
    STOP = "stop"


FINISHES = {
    FinishReason.EOS: Finish.EOS,
    FinishReason.STOP_TOKEN: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
}
FAILURES = {
    FinishReason.ERROR: GENERATION,
    FinishReason.SHED: OVERLOADED,
    FinishReason.STOPPED: UNAVAILABLE,
}


class Failure(RequestError):
    """Why a generation ended without its answer; it has been counted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued, and how; tokens and limits are checked."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    """Whether the stop string stays in the text (TGI) or is cut off (OpenAI)."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    """What the text must match; each choice gets a state of its own."""
    adapter: int = 0
    """Number of the adapter that it is computed with; 0 is the model itself."""


class TextOutput(NamedTuple):
    """What one token brought for one choice."""

    choice: int
    """The prompt's place in the call."""
    text: str
    """Text that can be shown now; may be empty."""
    token: Token | None
    prompt_tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    stop: str | int | None = None
    """The stop string, or the id of the stop token, that was found."""


def request_of(prompt: Prompt, id: str, client: str, fork_of: str | None, eos_ids: frozenset[int]) -> Request:
    """A prompt as the engine takes it; what would end its output too early follows from what ends it."""
    ends = frozenset() if prompt.ignore_eos else eos_ids
    stop_ids = frozenset(prompt.stop_token_ids)
    return Request(
        id=id,
        prompt_ids=prompt.token_ids,
        params=replace(prompt.params, ending_ids=ends | stop_ids),
        max_tokens=prompt.max_tokens,
        eos_ids=ends,
        stop_ids=stop_ids,
        constraint=None if prompt.grammar is None else prompt.grammar.start(),
        client=client,
        fork_of=fork_of,
        adapter=prompt.adapter,
    )


class Choice:
    """The text side of one prompt: its detokenizer, stop strings and counts."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index = index
        self.prompt = prompt
        self.cached_tokens = 0
        self._detokenizer = Detokenizer(tokenizer, prompt.token_ids)
        self._matcher = StopMatcher(prompt.stop, keep=prompt.keep_stop)

    def push(self, token: Token, prompt_tokens: tuple[Token, ...], reason: FinishReason | None) -> TextOutput:
        """Turn a token into the text that it completes."""
        text, finish = "", None
        stop: str | int | None = None
        if reason is not FinishReason.STOP_TOKEN or self.prompt.keep_stop:
            text = self._matcher.push(self._detokenizer.push(token.id))
        if reason is not None and self._matcher.matched is None:
            text += self._matcher.push(self._detokenizer.flush())
        if self._matcher.matched is not None:
            finish, stop = Finish.STOP, self._matcher.matched
        elif reason is not None:
            text += self._matcher.flush()
            finish = FINISHES[reason]
            stop = token.id if reason is FinishReason.STOP_TOKEN else None
        return TextOutput(self.index, text, token, prompt_tokens, finish, stop)


class Generation:
    """One admitted call with one choice a prompt; iterate over it once, and close it in any case."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        caller: Caller,
    ) -> None:
        self.choices = [Choice(index, prompt, tokenizer) for index, prompt in enumerate(prompts)]
        self.output_tokens = 0
        """Tokens generated so far, all choices together."""
        self._guessed_tokens = 0
        self._metrics = metrics
        call = f"{caller.request_id}-{secrets.token_hex(4)}"  # clients may use an id of theirs twice
        assert len({prompt.adapter for prompt in prompts}) == 1
        first: dict[tuple[int, ...], int] = {}  # equal prompts are computed once
        requests = []
        for index, prompt in enumerate(prompts):
            leader = first.setdefault(prompt.token_ids, index)
            fork_of = None if leader == index else f"{call}-{leader}"
            id = f"{call}-{index}"
            requests.append(request_of(prompt, id, caller.client, fork_of, tokenizer.eos_ids))
        try:
            self._submission = engine.submit(requests)
        except Overloaded:
            raise overloaded() from None
        except Stopped as stopped:
            raise RequestError(UNAVAILABLE, f"the model is not available: {stopped}") from None
        self._received = caller.received
        self._tally = caller.tally
        inputs = (tokenizer.decode(token_ids, False) for token_ids in first)
        self._tally.begin(self.prompt_tokens, inputs, len(prompts))
        self._ended: float | None = None
        self._unfinished = len(prompts)
        self._clocks = [
            metrics.start_request(len(prompt.token_ids), prompt.max_tokens, self._submission)
            for prompt in prompts
        ]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(choice.prompt.token_ids) for choice in self.choices)

    @property
    def timings(self) -> Timings:
        """Where the time went, up to the last token or now."""
        submitted, now = self._submission.submitted, self._ended or time.perf_counter()
        started = self._submission.started or now
        return Timings(
            validation=submitted - self._received,
            queue=started - submitted,
            inference=now - started,
            output_tokens=self.output_tokens,
            guessed_tokens=self._guessed_tokens,
        )

    async def __aiter__(self) -> AsyncIterator[TextOutput]:
        """Outputs as they come, those of different choices mixed (Failure)."""
        try:
            async for index, output in self._submission:
                choice, clock = self.choices[index], self._clocks[index]
                if output.finish_reason in FAILURES:
                    raise self._failure(index, FAILURES[output.finish_reason], output.error or "")
                choice.cached_tokens = output.cached_tokens
                if output.token is None:
                    finish = Finish.LENGTH if output.finish_reason is not None else None
                    text = TextOutput(index, "", None, output.prompt_tokens, finish)
                else:
                    self.output_tokens += 1
                    self._guessed_tokens += output.guessed
                    began = time.perf_counter()
                    try:
                        text = choice.push(output.token, output.prompt_tokens, output.finish_reason)
                    except Exception:
                        logger.exception("a token of choice %d could not be turned into text", index)
                        raise self._failure(index, GENERATION, TEXT_FAILED) from None
                    clock.count_token(began)
                    self._tally.count_token(index, text.text)
                if text.finish is not None:
                    self._submission.cancel(index)  # a stop string ends what the engine would go on with
                    clock.finish(text.finish.value)
                    self._unfinished -= 1
                    if self._unfinished == 0:
                        self._end(None)
                yield text
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is still running and free its blocks; idempotent."""
        self._submission.close()
        for clock in self._clocks:
            clock.finish("aborted")
        self._end("dropped")

    def _failure(self, index: int, kind: Kind, message: str) -> Failure:
        """What a choice that failed, and the whole call with it, is told; counted."""
        self._clocks[index].finish("error")
        self._end(kind.native_type)
        return Failure(kind, message, code="overloaded" if kind is OVERLOADED else None)

    def _end(self, error: str | None) -> None:
        """The call is over, without its answer if there is an error; only the first time counts."""
        if self._ended is not None:
            return
        self._ended = time.perf_counter()
        self._tally.course = Course(
            submitted=self._submission.submitted,
            started=self._submission.started,
            first=min((clock.first for clock in self._clocks if clock.first is not None), default=None),
            ended=self._ended,
            fates=tuple(clock.fate or "aborted" for clock in self._clocks),
            error=error,
        )
        if error is None:
            self._metrics.tgi.count_success(self.timings)
        else:
            self._metrics.tgi.count_failure(error)
