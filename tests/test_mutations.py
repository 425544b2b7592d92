"""The mutation check of the suite itself: each seeded fault of the KV path must fail at least one test.

A fault is a change of one line of the real source, compiled in its place; the detectors are the
tests of the other modules, called as they are.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_oracle
import test_rows
import test_sampler
from harness import Tiny

from model import layers, runner, sampler, transformer
from model.ops.layout import BatchLayout
from model.ops.reference import TorchOps
from server.engine.block_pool import BlockPool
from server.engine.block_tables import BlockTables


@dataclass(frozen=True)
class Fault:
    """One line of one function, and what it becomes."""

    owner: Any
    function: str
    line: str
    fault: str


FAULTS = {
    "decodes at position + 1": Fault(
        BatchLayout,
        "rows",
        "positions.extend(span)",
        "positions.extend(p + (chunk.count == 1) for p in span)",
    ),
    "chunks at position + 1": Fault(
        BatchLayout, "rows", "positions.extend(span)", "positions.extend(p + (chunk.start > 0) for p in span)"
    ),
    "mask aligned to the top left": Fault(BatchLayout, "_prefill_plan", ".tril(chunk.start)", ".tril(0)"),
    "mask one too far": Fault(BatchLayout, "_prefill_plan", ".tril(chunk.start)", ".tril(chunk.start + 1)"),
    "no mask in the first chunk": Fault(
        TorchOps, "_prefill", "is_causal=plan.mask is None", "is_causal=False"
    ),
    "no mask in later chunks": Fault(
        TorchOps,
        "_prefill",
        "attn_mask=plan.mask",
        "attn_mask=None if plan.mask is None else plan.mask | True",
    ),
    "keys and values swapped when stored": Fault(TorchOps, "rotate_and_store", "= value.to(", "= key.to("),
    "keys stored without rotation": Fault(
        TorchOps,
        "rotate_and_store",
        "query, key = _rotate(query, cosine, sine), _rotate(key",
        "query, _ = _rotate(query, cosine, sine), _rotate(key",
    ),
    "keys and values swapped when read": Fault(
        TorchOps, "_prefill", "keys = cache.key_slots", "keys = cache.value_slots"
    ),
    "kv heads repeated in the wrong order": Fault(
        BatchLayout, "_decode_plan", "// shared_by)[:, None]", "% num_kv_heads)[:, None]"
    ),
    "slots of a pass in another order": Fault(
        BatchLayout, "rows", "self._index(group) for", "self._index(group[::-1]) for"
    ),
    "one block off": Fault(BatchLayout, "rows", "table[p // size] *", "table[p // size - 1] *"),
    "context to the end of the block": Fault(BatchLayout, "_slots", "[first : chunk.stop]", "[first:]"),
    "context one token short": Fault(
        BatchLayout, "_slots", "[first : chunk.stop]", "[first : max(chunk.stop - 1, 1)]"
    ),
    "scores of unequal lengths mixed up": Fault(
        BatchLayout,
        "_decode_plan",
        "- bounds[matrix_row] + matrix_row",
        "- bounds[matrix_row] * 0 + matrix_row * 0",
    ),
    "attention writes to the wrong rows": Fault(
        TorchOps, "attention", "out[plans.decode.rows] =", "out[plans.decode.rows.flip(0)] ="
    ),
    "logits of the row before the last": Fault(
        runner,
        "_choosing",
        "rows += range(end - 1 - chunk.guesses, end)",
        "rows += (max(row - 1, 0) for row in range(end - 1 - chunk.guesses, end))",
    ),
    "a layer's cache used for another": Fault(
        transformer.Transformer,
        "forward",
        "zip(self.layers, cache.layers, strict=True)",
        "((layer, cache.layers[0]) for layer in self.layers)",
    ),
    "the residual forgotten": Fault(
        layers.DecoderLayer,
        "forward",
        "return self.ops.add(x, self.mlp.forward(",
        "return (lambda x, y, m: y)(x, self.mlp.forward(",
    ),
    "length not reset by a preemption": Fault(BlockTables, "free", "sequence.num_computed = 0", "pass"),
    "a preempted block table kept": Fault(BlockTables, "free", "sequence.block_tables = ()", "pass"),
    "a shared block freed by its first owner": Fault(
        BlockPool, "release", "block.references -= 1", "block.references = 0"
    ),
    "a reused block not taken from the free ones": Fault(
        BlockPool, "share", "block.references += 1", "block.references += 0"
    ),
    "prefixes matched by block, not by what is before": Fault(
        BlockTables, "_keys", "PrefixKey(parent, tuple", "PrefixKey(min(index, 1), tuple"
    ),
    "evicted content still found": Fault(BlockPool, "allocate", "del self._cached[block.key]", "pass"),
    "half-filled blocks made findable": Fault(
        BlockTables,
        "advance",
        "sequence.num_computed // self.block_size",
        "-(-sequence.num_computed // self.block_size)",
    ),
    "random numbers shared by all seeds": Fault(
        sampler, "uniform", "state = _mix(seed & _MASK)", "state = _mix(0)"
    ),
    "random numbers shared by all steps": Fault(sampler, "uniform", "(index + 1)", "1"),
    "penalties of the prompt": Fault(
        sampler, "_penalise", "row.token_ids[row.prompt_length : row.length]", "row.token_ids"
    ),
}

DETECTORS: dict[str, Callable[[Tiny, pytest.MonkeyPatch], None]] = {
    "oracle": lambda tiny, patch: test_oracle.test_every_logit_of_every_step_is_the_references(tiny),
    "chunks": lambda tiny, patch: test_rows.test_any_chunk_size_gives_the_same_logits(tiny, 35),
    "boundaries": lambda tiny, patch: test_rows.test_block_boundaries_with_guards(tiny, 33),
    "prefixes": lambda tiny, patch: test_rows.TestPrefixCache().test_hit_partial_hit_and_fork(tiny),
    "collisions": lambda tiny, patch: test_rows.TestPrefixCache().test_colliding_hashes_do_not_mix_texts(
        tiny, patch
    ),
    "preemption": lambda tiny, patch: test_rows.test_a_pool_that_runs_dry_preempts_and_changes_nothing(tiny),
    "neighbours": lambda tiny, patch: test_rows.test_neighbours_placement_and_poisoned_blocks_change_nothing(
        tiny, float("nan")
    ),
    "seeds": lambda tiny, patch: test_sampler.test_seeds_and_indices_give_independent_uniform_numbers(),
    "penalties": lambda tiny, patch: test_sampler.test_penalties_use_their_own_history_only(),
}


def mutate(fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """Compile the faulty function in place of the real one."""
    original = getattr(fault.owner, fault.function)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(fault.line) == 1, f"the line is not there exactly once:\n{source}"
    module = sys.modules[original.__module__]
    scope: dict[str, Any] = {}
    exec(compile(source.replace(fault.line, fault.fault), f"<{fault.function}>", "exec"), vars(module), scope)
    patch.setattr(fault.owner, fault.function, scope[fault.function])


def first_detector(tiny: Tiny) -> str | None:
    """The first test that fails, if one does."""
    for name, detector in DETECTORS.items():
        with pytest.MonkeyPatch.context() as patch:
            try:
                detector(tiny, patch)
            except Exception:
                return name
    return None


def test_without_a_fault_nothing_is_detected(tiny: Tiny) -> None:
    assert first_detector(tiny) is None


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_detected(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(FAULTS[name], monkeypatch)
    assert first_detector(tiny) is not None, "no test saw it"
