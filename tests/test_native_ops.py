"""What families ask of the native ops beyond Llama, against the reference; see test_native_kernels.py.

So only rounding may differ; each tolerance says which. Rows do not depend on the rows beside them.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_native_kernels import (
    BF16,
    BLOCK,
    EPSILON,
    NAN,
    REFERENCE,
    SPANS,
    assert_quantised,
    chunks_of,
    dequantised,
    each_variant,
    filled,
    integers_of,
    native_cache,
    normal,
    product_bound,
    quantised,
    read,
    rows_only,
    stored,
    torch_cache,
)
from torch import Tensor

from model import memory
from model.batch import Batch
from model.kv_cache import LayerCache
from model.ops.base import LowRank, QueryKeyNorm
from model.ops.native import NativeOps
from model.ops.native_handles import Hidden, Product
from model.ops.native_pass import Pass
from model.ops.panels import Matrix

__all__ = ["each_variant"]  # the fixture `ops`

COUNTS = (1, 3, 8, 17, 64, 129)
MULTIPLIERS = (1.0, 0.25, -3.0)


def vector(size: int, seed: int, mean: float = 0.0) -> Tensor:
    return memory.zeros((size,), torch.float32).copy_(normal(size, seed=seed) + mean)


def halves(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed).half().float() / 8


def pairs(inputs: int, outputs: int) -> list[LowRank]:
    """Of two adapters: one of rank 5 changes all outputs, one of rank 40 the last 16 and the first 32."""
    return [
        LowRank(1, 0, halves(5, inputs, seed=1), halves(outputs, 5, seed=2)),
        LowRank(2, outputs - 16, halves(40, inputs, seed=3), halves(16, 40, seed=4)),
        LowRank(2, 0, halves(8, inputs, seed=5), halves(32, 8, seed=6)),
    ]


def adapted(count: int) -> Batch:
    """A row a sequence, with adapters 0 to 3 in turns; the third changes other products only."""
    chunks = chunks_of([(0, 1)] * count).chunks
    return Batch(tuple(replace(chunk, adapter=index % 4) for index, chunk in enumerate(chunks)))


def gate_up(ops: NativeOps) -> Matrix:
    matrix = ops.matrix(2 * 96, 64)
    for i, part in enumerate(ops.split(matrix, (96, 96))):
        ops.fill(part, stored(normal(96, 64, seed=i) * 0.3, "Q8_0"))
    return matrix


class TestProducts:
    @pytest.mark.parametrize("multiplier", MULTIPLIERS)
    @pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
    def test_bias_and_multiplier(self, ops: NativeOps, kind: str, multiplier: float) -> None:
        """The product's rounding and that of three more operations, each half of EPSILON of its result."""
        matrix, weight = filled(ops, stored(normal(80, 96) * 0.1, kind))
        bias = vector(80, seed=1)
        for count in COUNTS:
            hidden = normal(count, 80, seed=count)
            with ops.recording(count, 1) as tape:
                given, exact = quantised(ops, normal(count, 96, seed=count + 1))
                want = hidden.double() + multiplier * REFERENCE.linear(exact, weight.double(), bias.double())
                ops.add(Hidden(hidden), ops.linear(given, matrix, bias), multiplier)
            tape.run(rows_only(count))
            bound = abs(multiplier) * (product_bound(exact, weight) + 2 * EPSILON * bias.abs())
            assert ((hidden - want).abs() <= bound + EPSILON * want.abs()).all(), count

    @pytest.mark.parametrize("multiplier", MULTIPLIERS)
    def test_norm_before_the_addition(self, ops: NativeOps, multiplier: float) -> None:
        """The product's rounding over its root mean square, twice as much for the factor; some operations."""
        matrix, weight = filled(ops, stored(normal(96, 64) * 0.3, "Q8_0"))
        scale = vector(96, seed=1, mean=1.0)
        for count in COUNTS:
            hidden = normal(count, 96, seed=count)
            with ops.recording(count, 1) as tape:
                given, exact = quantised(ops, normal(count, 64, seed=count + 1))
                y = REFERENCE.linear(exact, weight.double())
                normed = REFERENCE.rms_norm(y, scale.double(), 1e-5)
                want = hidden.double() + multiplier * normed
                ops.add(Hidden(hidden), ops.rms_norm(ops.linear(given, matrix), scale, 1e-5), multiplier)
            tape.run(rows_only(count))
            error = (
                product_bound(exact, weight).amax(-1, keepdim=True) / y.square().mean(-1, keepdim=True).sqrt()
            )
            bound = abs(multiplier) * (error * scale.abs() + (error + 16 * EPSILON) * normed.abs())
            assert ((hidden - want).abs() <= bound + EPSILON * want.abs()).all(), count

    def test_logits_multiplier(self, ops: NativeOps) -> None:
        """As much of the logits without one, in each of the selected rows."""
        matrix, weight = filled(ops, stored(normal(261, 64), "Q8_0"))
        x, scale, rows = normal(9, 64, seed=1), vector(64, seed=2), [8, 0, 3]
        with ops.recording(9, 9) as tape:
            normed = ops.rms_norm(ops.select(Hidden(x), None), scale, 1e-5)
            logits = ops.logits(normed, matrix, 0.125)
        tape.run(rows_only(9).select(np.asarray(rows, dtype=np.int32)))
        exact = dequantised(normed, 3)
        want = REFERENCE.linear(exact, weight.double()) * 0.125
        assert ((logits[:3] - want).abs() <= 0.125 * 2 * product_bound(exact, weight)).all()

    def test_the_stream_itself_is_quantised(self, ops: NativeOps) -> None:
        """Half a step of int8; a router is given the very numbers."""
        matrix, _ = filled(ops, stored(normal(16, 96), "Q8_0"))
        x = normal(65, 96, seed=1) * 3
        with ops.recording(65, 1) as tape:
            product = ops.linear(Hidden(x), matrix)
        tape.run(rows_only(65))
        assert_quantised(product.rows, x)
        assert product.rows.source is not None
        assert product.rows.source.rows is x

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_gates_that_were_written_down(self, ops: NativeOps, activation: str) -> None:
        """The bits are those of the product that is gated at once, where no row has an adapter."""
        matrix, idle = gate_up(ops), ops.adapters(pairs(64, 192))
        for count in COUNTS:
            parts = []
            for adapters in (None, idle):
                with ops.recording(count, 1) as tape:
                    given, _ = quantised(ops, normal(count, 64, seed=count))
                    out = ops.gated(Product(given, matrix, adapters=adapters), activation)
                tape.run(rows_only(count))
                parts.append(integers_of(out.rows, count))
            assert all(torch.equal(fused, written) for fused, written in zip(*parts, strict=True)), count

    @pytest.mark.parametrize("multiplier", MULTIPLIERS)
    def test_low_rank(self, ops: NativeOps, multiplier: float) -> None:
        """Float32 sums over inputs and ranks, of magnitudes; what no adapter changes keeps its bits."""
        matrix, _ = filled(ops, stored(normal(80, 96) * 0.1, "Q8_0"))
        all_pairs = pairs(96, 80)
        adapters = ops.adapters(all_pairs)
        for count in COUNTS:
            hidden, plain = normal(count, 80, seed=count), normal(count, 80, seed=count)
            with ops.recording(count, 1) as tape:
                given, exact = quantised(ops, normal(count, 96, seed=count + 1))
                y = ops.linear(given, matrix)
                ops.add(Hidden(plain), y, multiplier)
                ops.add(Hidden(hidden), ops.low_rank(y, given, adapters, None), multiplier)
            tape.run(Pass.of(adapted(count)))
            numbers = torch.arange(count) % 4
            added, magnitude = torch.zeros(count, 80).double(), torch.zeros(count, 80).double()
            for pair in all_pairs:
                rows, a, b = numbers == pair.adapter, pair.a.double(), pair.b.double()
                outputs = slice(pair.first, pair.first + len(b))
                added[rows, outputs] += exact[rows] @ a.T @ b.T
                magnitude[rows, outputs] += exact[rows].abs() @ a.abs().T @ b.abs().T
            bound = EPSILON * (96 + 48) / 2 * abs(multiplier) * magnitude
            bound += 2 * EPSILON * (plain.abs() + hidden.abs())
            assert ((hidden - plain - multiplier * added).abs() <= bound).all(), count
            untouched = magnitude == 0
            assert torch.equal(hidden[untouched], plain[untouched])


def test_embed_multiplier(ops: NativeOps) -> None:
    """One product in float32."""
    tensor = stored(normal(261, 96), "Q8_0")
    table, _ = filled(ops, tensor)
    with ops.recording(9, 1) as tape:
        hidden = ops.embed(None, table, 9.8125)
    batch = chunks_of([(0, 9)], vocab=261)
    tape.run(Pass.of(batch))
    assert torch.equal(hidden.rows, tensor.dequantise()[list(batch.chunks[0].token_ids)] * 9.8125)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("width", ["head", "width", None])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 3, 96), (2, 1, 256)])
def test_rotate_and_store(
    ops: NativeOps, heads: int, kv_heads: int, dim: int, width: str | None, rotated: bool
) -> None:
    """Half a bfloat16 step of the result, and the product's rounding, times what the norm scales it with."""
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    matrix = ops.matrix(sum(sizes), 64)
    for i, part in enumerate(ops.split(matrix, sizes)):
        ops.fill(part, stored(normal(part.outputs, 64, seed=i) * 0.2, "Q8_0"))
    weight, norm, growth = read(ops, matrix), None, 1.0
    if width is not None:
        spans = (dim, dim) if width == "head" else sizes[:2]
        norm = QueryKeyNorm(vector(spans[0], 1, mean=1.0), vector(spans[1], 2, mean=1.0), 1e-5)
        growth = 2 * float(max(norm.query.abs().max(), norm.key.abs().max()))
    rotary = None
    if rotated:
        angles = torch.arange(301)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
        rotary = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
    batch = chunks_of(SPANS["mixed"], blocks=60)
    count = batch.num_tokens
    empty = torch.full((60, BLOCK, kv_heads, dim), NAN)
    cache = native_cache(empty, empty)
    want_cache = LayerCache(empty.clone(), empty.clone(), kv_heads, dim)
    with ops.recording(count, 1) as tape:
        given, exact = quantised(ops, normal(count, 64, seed=5))
        queries = ops.rotate_and_store(Product(given, matrix), rotary, cache, None, heads, 0.3, norm=norm)
    tape.run(Pass.of(batch))
    qkv = REFERENCE.linear(exact, weight.double())
    slack = 2 * growth * float(product_bound(exact, weight).max()) + 1e-5 * (norm is not None)
    inputs = REFERENCE.prepare(batch, heads, kv_heads)
    want = REFERENCE.rotate_and_store(qkv.float(), rotary, want_cache, inputs, heads, 0.3, norm=norm)
    ours, (slots,) = torch_cache(cache), inputs.slots
    for got, expected in (
        (queries.rows.float(), want.flatten(1)),
        (ours.key_slots[slots], want_cache.key_slots[slots]),
        (ours.value_slots[slots], want_cache.value_slots[slots]),
    ):
        gap = (got - expected).abs()
        assert (gap <= BF16 * 1.001 * expected.abs() + slack).all(), float(gap.max())


# -- rows ---------------------------------------------------------------------------------------------

Rows = Callable[[NativeOps, Tensor, Batch], Tensor]


def biased(ops: NativeOps, x: Tensor, batch: Batch) -> Tensor:
    matrix, _ = filled(ops, stored(normal(80, 64) * 0.1, "Q8_0"))
    hidden, bias = torch.zeros(len(x), 80), vector(80, seed=1)
    with ops.recording(len(x), 1) as tape:
        ops.add(Hidden(hidden), ops.linear(Hidden(x), matrix, bias), 0.3)
    tape.run(Pass.of(batch))
    return hidden


def normed_after(ops: NativeOps, x: Tensor, batch: Batch) -> Tensor:
    matrix, _ = filled(ops, stored(normal(64, 64) * 0.1, "Q8_0"))
    hidden, scale = torch.zeros(len(x), 64), vector(64, seed=1)
    with ops.recording(len(x), 1) as tape:
        ops.add(Hidden(hidden), ops.rms_norm(ops.linear(Hidden(x), matrix), scale, 1e-5), 0.3)
    tape.run(Pass.of(batch))
    return hidden


def changed(ops: NativeOps, x: Tensor, batch: Batch) -> Tensor:
    matrix, adapters = gate_up(ops), ops.adapters(pairs(64, 192))
    with ops.recording(len(x), 1) as tape:
        y = ops.linear(Hidden(x), matrix)
        out = ops.gated(ops.low_rank(y, Hidden(x), adapters, None), "silu")
    tape.run(Pass.of(batch))
    return dequantised(out, len(x))


@pytest.mark.parametrize("rows_of", [biased, normed_after, changed])
def test_a_row_has_the_same_bits_whoever_is_beside_it(ops: NativeOps, rows_of: Rows) -> None:
    x, batch = normal(64, 64, seed=1), adapted(64)
    want = rows_of(ops, x, batch)
    for rows in ([0], [1], [63], [5, 2], [6, 14, 1], list(range(63, 31, -1)), list(range(17))):
        some = Batch(tuple(batch.chunks[row] for row in rows))
        assert torch.equal(rows_of(ops, x[rows].contiguous(), some), want[rows]), rows
