"""Decides what the next step computes: who runs and how many rows each; block_tables.py says where.

It knows no phases: each sequence's `num_computed` catches up with its token count, and a decode is
a share of one row. A fork waits until its leader has computed the prompt. Token ids only, no tensor,
no clock, no thread.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from model.batch import Batch, Chunk, ChunkResult, Copy, StepResult, Token
from server.engine.block_pool import BlockPool
from server.engine.block_tables import BlockTables
from server.engine.request import FinishReason, Request, Sequence, TokenOutput
from server.engine.waiting import WaitingQueue

logger = logging.getLogger("rivulet.scheduler")

NO_GUESSES: Mapping[Sequence, tuple[int, ...]] = {}

NOTHING = TokenOutput()

ADVANCE_FAILED = "the grammar could not take the token that was chosen"


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, for the metrics."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    """Waiting and running sequences over a pool for each cache group; `schedule` and `update` alternate."""

    def __init__(self, *pools: BlockPool, token_budget: int, max_running: int) -> None:
        assert token_budget >= 1 and max_running >= 1
        self.tables = BlockTables(pools, most_rows=token_budget)
        self.token_budget = token_budget
        self.max_running = max_running
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[str, Sequence] = {}
        self._preemptions = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no block yet, or none any more."""
        return len(self._by_id) - len(self._running)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences that need a single row for their next token."""
        return [sequence for sequence in self._running if sequence.num_pending == 1]

    @property
    def num_decoding(self) -> int:
        """How many those are."""
        return len(self.decoding)

    @property
    def num_newcomers(self) -> int:
        """Requests that could have rows of their prompts computed now, if the cache has the blocks."""
        places = self.max_running - len(self._running)
        return len(self._running) - self.num_decoding + min(len(self._waiting), places)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._by_id

    @property
    def promised_tokens(self) -> int:
        """Tokens that the running requests may come to, prompts and outputs."""
        requests = (sequence.request for sequence in self._running)
        return sum(len(request.prompt_ids) + request.max_tokens for request in requests)

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return SchedulerStats(self._preemptions, self._prompt_tokens, self._cached_tokens)

    def add(self, request: Request) -> None:
        """Queue a request; it must fit into the pool when it is alone there."""
        assert request.id not in self._by_id
        assert self.tables.fits_alone(len(request.prompt_ids) + request.max_tokens)
        sequence = Sequence(request)
        leader = sequence.leader = self._leader_of(request)
        self._by_id[request.id] = sequence
        if leader is not None and leader.num_computed < leader.prompt_length:
            leader.forks.append(sequence)
            self._waiting.charge(sequence)
        else:
            self._waiting.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; one that is unknown or finished is no error."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        place = 0
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            place = self._waiting.remove(sequence)
        else:
            assert sequence.leader is not None
            sequence.leader.forks.remove(sequence)
        self.tables.free(sequence)
        self._let_forks_go(sequence, place)

    def schedule(
        self, prefill_rows: int | None = None, guesses: Mapping[Sequence, tuple[int, ...]] = NO_GUESSES
    ) -> Batch | None:
        """Share the token budget out: decodes first, then prefills by age, then newcomers.

        `prefill_rows` bounds what the latter two get beside decodes, so that no prompt holds the others'
        next tokens up; None leaves them what the decodes leave. Guesses of what follows decoding sequences
        get rows as far as the prompts leave them, and cache blocks that nobody else needs.
        """
        shares: dict[Sequence, int] = {}
        copies: list[Copy] = []
        preemptions = self._preemptions
        decodes = self.num_decoding
        guesses = self._affordable(guesses, decodes)
        budget = self.token_budget - sum(map(len, guesses.values()))
        if decodes and prefill_rows is not None:
            budget = min(budget, decodes + prefill_rows)
        # A decode needs a single row, so no prompt, however long, makes the others wait for theirs.
        for sequence in sorted(self._running, key=lambda sequence: sequence.num_pending > 1):
            if sequence not in self._running:  # preempted for one before it
                continue
            share = self._share_for(sequence, budget)
            if share == 0:
                break
            while not self.tables.reserve(sequence, share):
                victim = self._running[-1]
                budget += shares.pop(victim, 0)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                shares[sequence] = share
                budget -= share
        # A step that took blocks away has none to give: who was preempted waits for the next one.
        while budget and preemptions == self._preemptions and self._waiting_fits():
            sequence = self._waiting.first
            share = min(sequence.num_pending, budget)
            reserved = self.tables.reserve(sequence, share)
            assert reserved
            self._waiting.pop()
            self._running.append(sequence)
            self._cached_tokens += sequence.cached_tokens
            copies += self.tables.take_over(sequence)
            shares[sequence] = share
            budget -= share
        if not shares:
            assert self.idle, "nothing can run though something waits"
            return None
        chunks = tuple(self._chunk(sequence, share, guesses) for sequence, share in shares.items())
        return Batch(chunks, tuple(copies))

    def update(self, batch: Batch, step: StepResult) -> list[tuple[str, TokenOutput]]:
        """Take in what a step found; gives what each request is to be told."""
        outputs = []
        for chunk, result in zip(batch.chunks, step.results, strict=True):
            sequence = self._by_id[chunk.request_id]
            assert sequence.num_computed == chunk.start
            known = len(sequence.token_ids)
            told = self._advance(sequence, chunk, result)
            # Guesses that did not come true leave keys and values behind, which the next step overwrites.
            came_true = max(0, len(sequence.token_ids) - known - 1)
            sequence.num_computed = min(chunk.stop, known + came_true)
            self.tables.advance(sequence)
            if sequence.num_computed >= sequence.prompt_length:
                self._let_forks_go(sequence)
            if told[-1].finish_reason is not None:
                self.abort(chunk.request_id)
            outputs += [(chunk.request_id, output) for output in told if output != NOTHING]
        return outputs

    def fail(
        self, request_ids: Iterable[str], reason: FinishReason, message: str
    ) -> list[tuple[str, TokenOutput]]:
        """End requests of a step that brought nothing for them; gives what each is to be told."""
        outputs = []
        for request_id in request_ids:
            self.abort(request_id)
            outputs.append((request_id, TokenOutput(finish_reason=reason, error=message)))
        return outputs

    def newest(self, batch: Batch) -> str:
        """Which of a batch's requests came last."""
        members = {chunk.request_id for chunk in batch.chunks}
        return next(request_id for request_id in reversed(self._by_id) if request_id in members)

    def check(self) -> None:
        """Assert the invariants of the queues and of the pool (AssertionError if one is broken)."""
        held = [fork for sequence in self._by_id.values() for fork in sequence.forks]
        everyone = [*self._waiting, *self._running, *held]
        assert len(set(everyone)) == len(everyone) == len(self._by_id)
        assert self.num_waiting == len(self._waiting) + len(held)
        assert len(self._running) <= self.max_running
        for sequence in everyone:
            assert 0 <= sequence.num_computed <= len(sequence.token_ids)
        for sequence in (*self._waiting, *held):
            assert not sequence.block_tables and sequence.num_computed == 0
        for fork in held:
            leader = fork.leader
            assert leader is not None and fork in leader.forks and not fork.forks and leader not in held
            assert leader.num_computed < leader.prompt_length == fork.prompt_length
        for sequence in self._running:
            assert sequence.leader is None
        self.tables.check(self._running)

    def _leader_of(self, request: Request) -> Sequence | None:
        """Whose prompt a new request shares, if that one is still there; never one that is held itself."""
        if request.fork_of is None or request.params.prompt_logprobs is not None:
            return None  # the row of each prompt token is needed
        leader = self._by_id.get(request.fork_of)
        if leader is not None and leader.leader is not None and leader in leader.leader.forks:
            leader = leader.leader
        assert leader is None or leader.request.prompt_ids == request.prompt_ids
        assert leader is None or leader.request.adapter == request.adapter
        return leader

    def _let_forks_go(self, leader: Sequence, place: int = 0) -> None:
        """Queue the forks that a sequence holds, from `place` on; they share what it has computed by then."""
        for fork in reversed(leader.forks):
            self._waiting.insert(place, fork)
        leader.forks = []

    def _share_for(self, sequence: Sequence, budget: int) -> int:
        """Rows for one that runs; a prompt leaves up to half of them to a shorter one that comes after it."""
        pending = sequence.num_pending
        if pending > 1:
            later = self._running[self._running.index(sequence) + 1 :]
            after = [other.num_pending for other in later if other.num_pending > 1]
            if self._waiting and len(self._running) < self.max_running:
                newcomer = self._waiting.first
                if self.tables.fits(len(newcomer.token_ids)):
                    after.append(newcomer.num_pending)
            shortest = min(after, default=pending)
            if shortest < pending:
                budget -= min(shortest, budget // 2)
        return min(pending, budget)

    def _waiting_fits(self) -> bool:
        """Whether the first waiting sequence can run; if so it holds what there is of its prefix."""
        if not self._waiting or len(self._running) == self.max_running:
            return False
        return self.tables.start(self._waiting.first)

    def _advance(self, sequence: Sequence, chunk: Chunk, result: ChunkResult) -> list[TokenOutput]:
        """Append what the step chose, if it came to the sequence's end, up to a token that ends it."""
        scored = result.prompt_tokens[max(0, sequence.num_scored - chunk.start) :]
        sequence.num_scored += len(scored)
        if result.error is not None:
            return [TokenOutput(finish_reason=FinishReason.ERROR, error=result.error)]
        if not result.next_tokens:
            return [TokenOutput(prompt_tokens=scored)]
        if sequence.num_output == 0 and not sequence.forked:  # a fork's was counted with its leader's
            self._prompt_tokens += sequence.prompt_length
        if sequence.request.max_tokens == 0:
            return [TokenOutput(prompt_tokens=scored, finish_reason=FinishReason.LENGTH)]
        told = [self._append(sequence, result.next_tokens[0], scored)]
        for token in result.next_tokens[1:]:
            if told[-1].finish_reason is not None:
                break
            told.append(self._append(sequence, token, (), guessed=True))
        return told

    def _append(
        self, sequence: Sequence, token: Token, scored: tuple[Token, ...], guessed: bool = False
    ) -> TokenOutput:
        """Take a chosen token in."""
        sequence.token_ids.append(token.id)
        try:
            reason = self._ending(sequence, token.id)
        except BaseException as error:  # a panic of llguidance, which is Rust, is no Exception
            logger.warning("the constraint of request %s failed: %r", sequence.request.id, error)
            return TokenOutput(finish_reason=FinishReason.ERROR, error=ADVANCE_FAILED)
        return TokenOutput(token, scored, sequence.cached_tokens, reason, guessed=guessed)

    def _ending(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Why the output ends with its new token, if it does; whatever the constraint raises."""
        request = sequence.request
        if token_id in request.eos_ids:
            return FinishReason.EOS
        if token_id in request.stop_ids:
            return FinishReason.STOP_TOKEN
        if request.constraint is not None and request.constraint.advance(token_id):
            return FinishReason.EOS
        return FinishReason.LENGTH if sequence.num_output == request.max_tokens else None

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it will compute its tokens again, first among the waiting."""
        self._running.remove(sequence)
        self.tables.free(sequence)
        self._waiting.insert(0, sequence)
        self._let_forks_go(sequence, place=1)
        self._preemptions += 1

    def _affordable(
        self, guesses: Mapping[Sequence, tuple[int, ...]], decodes: int
    ) -> dict[Sequence, tuple[int, ...]]:
        """Those guesses for which there are rows: prompts that wait for theirs get as many at least."""
        if not guesses:
            return {}
        rows = max(0, self.token_budget - decodes)
        if self.num_newcomers:
            rows //= 2
        some = {}
        for sequence, tokens in guesses.items():
            assert sequence.num_pending == 1 and len(tokens) <= sequence.most_guesses
            if taken := tokens[:rows]:
                some[sequence] = taken
                rows -= len(taken)
        return some

    def _chunk(self, sequence: Sequence, share: int, guesses: Mapping[Sequence, tuple[int, ...]]) -> Chunk:
        guessed = guesses.get(sequence, ())
        if guessed and not self.tables.reserve(sequence, share + len(guessed)):
            guessed = ()
        return Chunk(
            request_id=sequence.request.id,
            token_ids=[*sequence.token_ids, *guessed] if guessed else sequence.token_ids,
            start=sequence.num_computed,
            count=share + len(guessed),
            block_tables=sequence.block_tables,
            prompt_length=sequence.prompt_length,
            params=sequence.request.params,
            constraint=sequence.request.constraint,
            adapter=sequence.request.adapter,
            guesses=len(guessed),
        )
