"""Decides what the next step computes: who runs, how many rows each, in which cache blocks.

It knows no phases: each sequence's `num_computed` catches up with its token count, and a decode is
a share of one row. Token ids only, no tensor, no clock, no thread.
"""

from collections import deque
from dataclasses import dataclass

from model.batch import Batch, Chunk, ChunkResult, StepResult
from server.engine.block_pool import ROOT, BlockPool
from server.engine.request import FinishReason, Request, Sequence, TokenOutput


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, for the metrics."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    """Waiting and running sequences over one pool; `schedule` and `update` alternate."""

    def __init__(self, pool: BlockPool, *, token_budget: int, max_running: int) -> None:
        assert token_budget >= 1 and max_running >= 1
        self.pool = pool
        self.token_budget = token_budget
        self.max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[str, Sequence] = {}
        self._preemptions = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no block yet, or none any more."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._by_id

    @property
    def block_tables(self) -> list[list[int]]:
        """The block tables in use."""
        return [sequence.block_table for sequence in self._running]

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return SchedulerStats(self._preemptions, self._prompt_tokens, self._cached_tokens)

    def add(self, request: Request) -> None:
        """Queue a request; it must fit into the pool when it is alone there."""
        assert request.id not in self._by_id
        assert self.pool.blocks_for(len(request.prompt_ids) + request.max_tokens) <= self.pool.num_blocks
        sequence = Sequence(request)
        self._by_id[request.id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; one that is unknown or finished is no error."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._free(sequence)

    def schedule(self) -> Batch | None:
        """Share the token budget out: decodes first, then prefills by age, then newcomers."""
        shares: dict[Sequence, int] = {}
        preemptions = self._preemptions
        budget = self.token_budget
        # A decode needs a single row, so no prompt, however long, makes the others wait for theirs.
        for sequence in sorted(self._running, key=lambda sequence: sequence.num_pending > 1):
            if sequence not in self._running:  # preempted for one before it
                continue
            share = min(sequence.num_pending, budget)
            if share == 0:
                break
            while not self._reserve(sequence, share):
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
            sequence = self._waiting[0]
            share = min(sequence.num_pending, budget)
            reserved = self._reserve(sequence, share)
            assert reserved
            self._waiting.popleft()
            self._running.append(sequence)
            self._cached_tokens += sequence.cached_tokens
            shares[sequence] = share
            budget -= share
        if not shares:
            assert self.idle, "nothing can run though something waits"
            return None
        return Batch(tuple(self._chunk(sequence, share) for sequence, share in shares.items()))

    def update(self, batch: Batch, step: StepResult) -> list[tuple[str, TokenOutput]]:
        """Take in what a step found; gives what each request is to be told."""
        outputs = []
        for chunk, result in zip(batch.chunks, step.results, strict=True):
            sequence = self._by_id[chunk.request_id]
            assert sequence.num_computed == chunk.start
            sequence.num_computed = chunk.stop
            self._register_full_blocks(sequence)
            output = self._advance(sequence, chunk, result)
            if output.finish_reason is not None:
                self.abort(chunk.request_id)
            if output != TokenOutput():
                outputs.append((chunk.request_id, output))
        return outputs

    def fail(self, batch: Batch, message: str) -> list[tuple[str, TokenOutput]]:
        """End every request of a batch whose step failed."""
        failed = [chunk.request_id for chunk in batch.chunks]
        for request_id in failed:
            self.abort(request_id)
        return [(id_, TokenOutput(finish_reason=FinishReason.ERROR, error=message)) for id_ in failed]

    def check(self) -> None:
        """Assert the invariants of the queues and of the pool (AssertionError if one is broken)."""
        everyone = [*self._waiting, *self._running]
        assert len(set(everyone)) == len(everyone) == len(self._by_id)
        assert len(self._running) <= self.max_running
        for sequence in everyone:
            assert 0 <= sequence.num_computed <= len(sequence.token_ids)
        for sequence in self._waiting:
            assert not sequence.block_table and sequence.num_computed == 0
        for sequence in self._running:
            assert sequence.num_computed <= len(sequence.block_table) * self.pool.block_size
        self.pool.check(self.block_tables)

    def _reserve(self, sequence: Sequence, share: int) -> bool:
        """Make the block table cover the next `share` tokens, if the pool has the blocks."""
        missing = self.pool.blocks_for(sequence.num_computed + share) - len(sequence.block_table)
        blocks = self.pool.allocate(max(missing, 0))
        if blocks is None:
            return False
        sequence.block_table.extend(blocks)
        return True

    def _waiting_fits(self) -> bool:
        """Whether the first waiting sequence can run; if so it holds what the pool has of its prefix.

        It starts only when all its tokens find a place, although it takes its blocks chunk by chunk:
        one that starts too early would be preempted halfway.
        """
        if not self._waiting or len(self._running) == self.max_running:
            return False
        sequence = self._waiting[0]
        if sequence.request.params.prompt_logprobs is None:  # else the row of each token is needed
            sequence.block_table, sequence.content = self.pool.match(sequence.token_ids)
        missing = self.pool.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        if missing > self.pool.num_free:
            self._free(sequence)
            return False
        sequence.num_registered = len(sequence.block_table)
        sequence.num_computed = sequence.num_registered * self.pool.block_size
        sequence.cached_tokens = min(sequence.num_computed, len(sequence.request.prompt_ids))
        return True

    def _register_full_blocks(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        for index in range(sequence.num_registered, sequence.num_computed // size):
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            sequence.content = self.pool.register(sequence.block_table[index], sequence.content, tokens)
            sequence.num_registered = index + 1

    def _advance(self, sequence: Sequence, chunk: Chunk, result: ChunkResult) -> TokenOutput:
        """Append the chosen token, if the step reached the end of the sequence."""
        request, token = sequence.request, result.next_token
        scored = result.prompt_tokens[max(0, sequence.num_scored - chunk.start) :]
        sequence.num_scored += len(scored)
        if token is None:
            return TokenOutput(prompt_tokens=scored)
        if sequence.num_output == 0:
            self._prompt_tokens += len(request.prompt_ids)
        if request.max_tokens == 0:
            return TokenOutput(prompt_tokens=scored, finish_reason=FinishReason.LENGTH)
        sequence.token_ids.append(token.id)
        reason = None
        if token.id in request.eos_ids:
            reason = FinishReason.EOS
        elif sequence.num_output == request.max_tokens:
            reason = FinishReason.LENGTH
        return TokenOutput(token, scored, sequence.cached_tokens, reason)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it will compute its tokens again, first among the waiting."""
        self._running.remove(sequence)
        self._free(sequence)
        self._waiting.appendleft(sequence)
        self._preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        sequence.num_registered = 0
        sequence.content = ROOT

    def _chunk(self, sequence: Sequence, share: int) -> Chunk:
        return Chunk(
            request_id=sequence.request.id,
            token_ids=sequence.token_ids,
            start=sequence.num_computed,
            count=share,
            block_table=sequence.block_table,
            prompt_length=len(sequence.request.prompt_ids),
            params=sequence.request.params,
        )
