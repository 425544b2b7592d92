"""Kernels beyond the common path: weights in bfloat16, windows, and AMX's tiles against the other code.

The tiles run by a model of the instructions in plain C++ (native/tiles.h); on a processor with AMX the
real ones do, in test_native_kernels.py and test_native_rows.py.
"""

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from harness import TILES, make_ops
from test_native_kernels import (
    BF16,
    BLOCK,
    EPSILON,
    MOST_BLOCKS,
    NAN,
    REFERENCE,
    SPANS,
    array,
    assert_quantised,
    chunks_of,
    dequantised,
    filled,
    native_cache,
    normal,
    product_bound,
    quantised,
    read,
    rows_only,
    slots_of,
    stored,
    torch_cache,
)
from torch import Tensor

from model import memory
from model.backend import VARIANTS
from model.batch import Batch
from model.ops.native import NativeOps
from model.ops.native_handles import Hidden, Product, Quantised, Queries
from model.ops.native_pass import Pass
from model.ops.panels import GROUP
from model.weights.stored import StoredTensor


@pytest.fixture(scope="module", params=VARIANTS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """With plain weights in bfloat16."""
    made = make_ops(request.param, bits=16)
    assert isinstance(made, NativeOps)
    return made


def halves(rows: Quantised, count: int) -> Tensor:
    """What a product in bfloat16 reads: the sum of the planes, in float64."""
    inner = rows.rows
    bits = array(inner.halves, ctypes.c_int16, count, inner.planes, inner.inputs)
    return bits.view(torch.bfloat16).double().sum(1)


class TestBfloat16:
    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_plain_numbers_are_rounded_once(self, ops: NativeOps, kind: str) -> None:
        tensor = stored(normal(37, 96), kind)
        matrix, ours = filled(ops, tensor)
        assert matrix.panels is not None
        assert matrix.panels.bits == 16
        assert torch.equal(ours, tensor.dequantise().bfloat16().float())

    def test_blocks_stay_what_they_are(self, ops: NativeOps) -> None:
        matrix, _ = filled(ops, stored(normal(32, 64), "Q4_0"))
        assert matrix.panels is not None
        assert matrix.panels.bits == 4

    def test_a_weight_that_is_not_finite_is_refused(self, ops: NativeOps) -> None:
        with pytest.raises(ValueError, match="beyond what panels hold"):
            ops.fill(ops.matrix(16, 32), stored(torch.full((16, 32), math.inf), "F32"))
        filled(ops, stored(torch.full((16, 32), 1e30), "F32"))  # too large for float16, and held

    @pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 96), (260, 576), (576, 1536)])
    def test_linear(self, ops: NativeOps, outputs: int, inputs: int) -> None:
        """Products of bfloat16 are exact in float32; what may differ is the rounding of their sums."""
        matrix, weight = filled(ops, stored(normal(outputs, inputs, seed=1), "BF16"))
        one = memory.zeros((inputs,), torch.float32).fill_(1.0)
        for count in (1, 2, 3, 5, 8, 9, 16, 33, 64, 130):
            x = normal(count, inputs, seed=count)
            with ops.recording(count, count) as tape:
                given = ops.rms_norm(Hidden(x), one, 1e-5)
                out = torch.zeros(count, matrix.rows)
                ops.add(Hidden(out), Product(given, matrix))
            tape.run(rows_only(count))
            exact = halves(given, count)
            normed = REFERENCE.rms_norm(x, one, 1e-5)
            assert ((exact - normed).abs() <= BF16 * 1.01 * normed.abs()).all()
            want = exact @ weight.double().t()
            bound = EPSILON * (inputs / 2 + 2) * (exact.abs() @ weight.double().abs().t())
            assert ((out[:, :outputs] - want).abs() <= bound).all(), count

    def test_the_logits_rows_have_a_second_plane(self, ops: NativeOps) -> None:
        """Which holds what rounding to bfloat16 left over: 16 bits of a number in all."""
        matrix, weight = filled(ops, stored(normal(64, 96, seed=1), "BF16"))
        one = memory.zeros((96,), torch.float32).fill_(1.0)
        x = normal(5, 96, seed=2)
        with ops.recording(5, 5) as tape:
            given = ops.rms_norm(ops.select(Hidden(x), None), one, 1e-5)
            logits = ops.logits(given, matrix)
        tape.run(rows_only(5).select(torch.arange(5, dtype=torch.int32).numpy()))
        normed = REFERENCE.rms_norm(x.double(), one.double(), 1e-5)
        assert float((halves(given, 5) - normed).abs().max()) < 2 * BF16**2 * float(normed.abs().max())
        torch.testing.assert_close(logits.double(), normed @ weight.double().t(), rtol=1e-4, atol=1e-3)

    def test_one_model_with_both_kinds(self, ops: NativeOps) -> None:
        """Rows are written in both forms, and each part of a matrix reads its own."""
        matrix = ops.matrix(96, 64)
        parts = ops.split(matrix, (48, 48))
        ops.fill(parts[0], stored(normal(48, 64, seed=1), "BF16"))
        ops.fill(parts[1], stored(normal(48, 64, seed=2), "Q8_0"))
        one = memory.zeros((64,), torch.float32).fill_(1.0)
        x = normal(9, 64, seed=3)
        out = torch.zeros(9, 96)
        with ops.recording(9, 1) as tape:
            given = ops.rms_norm(Hidden(x), one, 1e-5)
            ops.add(Hidden(out), Product(given, matrix))
        tape.run(rows_only(9))
        normed, weight = REFERENCE.rms_norm(x.double(), one.double(), 1e-5), read(ops, matrix).double()
        assert_quantised(given, normed, error=normed.abs() * EPSILON * 16)
        assert float((halves(given, 9) - normed).abs().max()) < BF16 * float(normed.abs().max())
        exact = torch.cat((halves(given, 9) @ weight[:48].t(), dequantised(given, 9) @ weight[48:].t()), 1)
        assert ((out - exact).abs() <= product_bound(normed, weight)).all()
        assert float((out - exact).abs().max()) > 0


class TestWindow:
    @pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 520, 1000])
    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    def test_a_row_sees_its_window_only(
        self, ops: NativeOps, spans: list[tuple[int, int]], window: int
    ) -> None:
        """Blocks before the window are not-a-number: whoever reads one is seen."""
        blocks, dim = MOST_BLOCKS, 64
        batch = chunks_of(spans, seed=window, blocks=blocks)
        keys, values = torch.full((2, blocks, BLOCK, 2, dim), NAN)
        for part, seed in ((keys, 1), (values, 2)):
            for chunk in batch.chunks:
                first = max(0, chunk.start + 1 - window) // BLOCK * BLOCK
                places = [
                    chunk.block_tables[0][p // BLOCK] * BLOCK + p % BLOCK for p in range(first, chunk.stop)
                ]
                part.flatten(0, 1)[places] = normal(len(places), 2, dim, seed=seed + chunk.start)
        cache = native_cache(keys, values)
        query = (normal(batch.num_tokens, 6 * dim, seed=3) / math.sqrt(dim)).bfloat16().contiguous()
        with ops.recording(batch.num_tokens, 1) as tape:
            out = ops.attention(Queries(query), cache, None, window)
        tape.run(Pass.of(batch))
        clean = torch_cache(cache)
        for part in (clean.keys, clean.values):
            part.nan_to_num_(0.0)
        inputs = REFERENCE.prepare(batch, 6, 2, [window])
        want = REFERENCE.attention(query.float().view(-1, 6, dim), clean, inputs, window)
        largest = float(clean.values.abs().max())
        assert_quantised(out, want, error=1.1 * BF16 * largest / 2 * torch.ones_like(want))

    def test_another_window_gives_other_rows(self, ops: NativeOps) -> None:
        batch = chunks_of([(60, 64)], blocks=10)
        filled_slots = slots_of(batch)
        keys, values = torch.zeros(2, 10, BLOCK, 1, 32)
        keys.flatten(0, 1)[filled_slots] = normal(64, 1, 32, seed=1)
        values.flatten(0, 1)[filled_slots] = normal(64, 1, 32, seed=2)
        cache = native_cache(keys, values)
        query = (normal(4, 32, seed=3) / 8).bfloat16()
        results = []
        for window in (20, 21):
            with ops.recording(4, 1) as tape:
                out = ops.attention(Queries(query), cache, None, window)
            tape.run(Pass.of(batch))
            results.append(array(out.rows.halves or out.rows.values, ctypes.c_int8, 4, 32))
        assert not torch.equal(*results)


class TestTiles:
    """The same bits as without tiles, for every number of rows around their size."""

    COUNTS = (31, 32, 33, 39, 40, 41, 47, 48, 49, 64, 100, 127, 128, 129, 130, 150, 160, 161, 255, 257, 300)

    @pytest.fixture(scope="class")
    def pair(self) -> tuple[NativeOps, NativeOps]:
        best = next(name for name in ("avx512", "avx512_vnni", "avx2") if _runs(name))
        tiles, plain = make_ops(TILES), make_ops(best)
        assert isinstance(tiles, NativeOps)
        assert isinstance(plain, NativeOps)
        return tiles, plain

    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "INT4", "INT8"])
    @pytest.mark.parametrize("inputs", [32, 64, 96, 576])
    def test_linear(self, pair: tuple[NativeOps, NativeOps], kind: str, inputs: int) -> None:
        tensor = stored(normal(80, inputs, seed=1), kind)
        for count in self.COUNTS:
            with_tiles, without = (product(ops, tensor, normal(count, inputs, seed=count)) for ops in pair)
            assert torch.equal(with_tiles.view(torch.int32), without.view(torch.int32)), count

    def test_gated(self, pair: tuple[NativeOps, NativeOps]) -> None:
        for count in self.COUNTS:
            results = []
            for ops in pair:
                matrix = ops.matrix(2 * 96, 64)
                for i, part in enumerate(ops.split(matrix, (96, 96))):
                    ops.fill(part, stored(normal(96, 64, seed=i), ("Q4_0", "Q8_0")[i]))
                with ops.recording(count, 1) as tape:
                    given, _ = quantised(ops, normal(count, 64, seed=count))
                    out = ops.gated(Product(given, matrix), "silu")
                tape.run(rows_only(count))
                results.append(array(out.rows.values, ctypes.c_int8, count, 96))
            assert torch.equal(*results), count

    def test_logits(self, pair: tuple[NativeOps, NativeOps]) -> None:
        """Rows in two planes."""
        x, scale = normal(40, 96, seed=3), memory.zeros((96,), torch.float32).fill_(1.0)
        for count in (1, 15, 16, 19, 20, 21, 24, 25, 33, 40):
            results = []
            for ops in pair:
                matrix, _ = filled(ops, stored(normal(1000, 96, seed=2), "Q8_0"))
                with ops.recording(40, 40) as tape:
                    logits = ops.logits(ops.rms_norm(ops.select(Hidden(x), None), scale, 1e-5), matrix)
                tape.run(rows_only(40).select(torch.arange(count, dtype=torch.int32).numpy()))
                results.append(logits[:count].view(torch.int32).clone())
            assert torch.equal(*results), count

    @pytest.mark.parametrize("dim", [32, 64, 96, 256])
    @pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (1, 1), (2, 6), (1, 19)])
    @pytest.mark.parametrize("window", [None, 20])
    def test_attention(
        self, pair: tuple[NativeOps, NativeOps], window: int | None, kv_heads: int, group: int, dim: int
    ) -> None:
        """Rows that go together through tiles as one at a time; what nobody wrote is not-a-number."""
        ops, heads, stop = pair[0], kv_heads * group, 285
        keys, values = (torch.full((20, BLOCK, kv_heads, dim), math.nan) for _ in "kv")
        whole = chunks_of([(0, stop)], blocks=20)
        written = slots_of(whole)
        keys.flatten(0, 1)[written] = normal(stop, kv_heads, dim, seed=1) * 2
        values.flatten(0, 1)[written] = normal(stop, kv_heads, dim, seed=2)
        cache = native_cache(keys, values)
        query = (normal(stop, heads * dim, seed=3) / math.sqrt(dim)).bfloat16().contiguous()

        def rows(start: int, end: int) -> Tensor:
            chunk = replace(whole.chunks[0], start=start, count=end - start)
            with ops.recording(end - start, 1) as tape:
                out = ops.attention(Queries(query[start:end].contiguous()), cache, None, window)
            tape.run(Pass.of(Batch((chunk,))))
            values = array(out.rows.values, ctypes.c_int8, end - start, heads * dim)
            scales = array(out.rows.scales, ctypes.c_float, end - start, heads * dim // GROUP)
            return torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), 1)

        together = rows(0, stop)
        for row in (0, 1, 15, 16, 17, 31, 32, 100, 255, 256, 257, stop - 1):
            assert torch.equal(rows(row, row + 1)[0], together[row]), row
        assert torch.equal(rows(200, 275), together[200:275])

    def test_other_weights_would_be_seen(self, pair: tuple[NativeOps, NativeOps]) -> None:
        tiles, plain = pair
        weights = normal(16, 64)
        one = product(tiles, stored(weights, "Q8_0"), normal(32, 64))
        weights[3, 5] += 0.05
        assert not torch.equal(one, product(plain, stored(weights, "Q8_0"), normal(32, 64)))


def _runs(variant: str) -> bool:
    try:
        make_ops(variant)
    except pytest.skip.Exception:
        return False
    return True


def product(ops: NativeOps, tensor: StoredTensor, x: Tensor) -> Tensor:
    matrix, _ = filled(ops, tensor)
    out = torch.zeros(len(x), tensor.shape[0])
    with ops.recording(len(x), 1) as tape:
        given, _ = quantised(ops, x)
        ops.add(Hidden(out), Product(given, matrix))
    tape.run(rows_only(len(x)))
    return out
