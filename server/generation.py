"""From a validated prompt to text: the one path that every dialect streams or collects.

Submits to the engine, turns tokens into text deltas, finds stop strings, and gives the blocks back
whatever happens. Knows no wire format.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum

from model.batch import SamplingParams, Token
from server.engine.engine import Engine, Overloaded, Stopped
from server.engine.request import FinishReason, Request
from server.errors import GENERATION, UNAVAILABLE, RequestError, overloaded
from server.metrics import Metrics
from server.text.detokenizer import Detokenizer
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer


class Finish(Enum):
    """Why a text ended; each dialect has its own word for it."""

    EOS = "eos"
    LENGTH = "length"
    STOP = "stop"


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


@dataclass(frozen=True, slots=True)
class TextOutput:
    """What one token brought for one choice."""

    index: int
    """The prompt's place in the call."""
    text: str
    """Text that can be shown now; may be empty."""
    token: Token | None
    prompt_tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    stop: str | None = None
    """The stop string that was found."""


class Choice:
    """The text side of one prompt: its detokenizer, stop strings and counts."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index = index
        self.prompt = prompt
        self.num_output = 0
        self.cached_tokens = 0
        self._detokenizer = Detokenizer(tokenizer, prompt.token_ids)
        self._matcher = StopMatcher(prompt.stop, keep=prompt.keep_stop)

    def push(self, token: Token, prompt_tokens: tuple[Token, ...], reason: FinishReason | None) -> TextOutput:
        """Turn a token into the text that it completes."""
        self.num_output += 1
        text = self._matcher.push(self._detokenizer.push(token.id))
        finish = None
        if reason is not None and self._matcher.matched is None:
            text += self._matcher.push(self._detokenizer.flush())
        if self._matcher.matched is not None:
            finish = Finish.STOP
        elif reason is not None:
            text += self._matcher.flush()
            finish = Finish.EOS if reason is FinishReason.EOS else Finish.LENGTH
        return TextOutput(self.index, text, token, prompt_tokens, finish, self._matcher.matched)


class Generation:
    """One admitted call with one choice a prompt; iterate over it once, and close it in any case."""

    def __init__(
        self, prompts: Sequence[Prompt], engine: Engine, tokenizer: Tokenizer, metrics: Metrics
    ) -> None:
        self.choices = [Choice(index, prompt, tokenizer) for index, prompt in enumerate(prompts)]
        self._metrics = metrics
        call = secrets.token_hex(8)
        requests = [
            Request(
                id=f"{call}-{index}",
                prompt_ids=prompt.token_ids,
                params=prompt.params,
                max_tokens=prompt.max_tokens,
                eos_ids=frozenset() if prompt.ignore_eos else tokenizer.eos_ids,
            )
            for index, prompt in enumerate(prompts)
        ]
        try:
            self._submission = engine.submit(requests)
        except Overloaded:
            metrics.count_rejection("overloaded")
            raise overloaded() from None
        except Stopped:
            metrics.count_rejection("stopped")
            raise RequestError(UNAVAILABLE, "the model is not available: the server is stopping") from None
        self._clocks = [metrics.start_request(len(prompt.token_ids)) for prompt in prompts]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(choice.prompt.token_ids) for choice in self.choices)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, all choices together."""
        return sum(choice.num_output for choice in self.choices)

    async def __aiter__(self) -> AsyncIterator[TextOutput]:
        """Outputs as they come, those of different choices mixed (RequestError if the model fails)."""
        try:
            async for index, output in self._submission:
                choice, clock = self.choices[index], self._clocks[index]
                if output.finish_reason is FinishReason.ERROR:
                    clock.finish("error")
                    raise RequestError(GENERATION, output.error or "the model failed")
                choice.cached_tokens = output.cached_tokens
                if output.token is None:
                    finish = Finish.LENGTH if output.finish_reason is not None else None
                    text = TextOutput(index, "", None, output.prompt_tokens, finish)
                else:
                    text = choice.push(output.token, output.prompt_tokens, output.finish_reason)
                    clock.count_token()
                if text.finish is not None:
                    self._submission.cancel(index)  # a stop string ends what the engine would go on with
                    clock.finish(text.finish.value)
                yield text
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is still running and free its blocks; idempotent."""
        self._submission.close()
        for clock in self._clocks:
            clock.finish("aborted")
