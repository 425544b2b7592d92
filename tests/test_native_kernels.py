"""The native kernels, op by op, against torch on the same dequantised weights and activations.

So only rounding may differ; each tolerance says which. Whatever a kernel must not read is not-a-number.
"""

import ctypes
import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from harness import make_ops
from torch import Tensor

from model import memory
from model.backend import VARIANTS
from model.batch import Batch, Chunk, SamplingParams
from model.kv_cache import LayerCache
from model.ops.layout import TorchInputs
from model.ops.library import InputRows
from model.ops.native import NativeOps
from model.ops.native_handles import Hidden, Product, Quantised, Queries
from model.ops.native_pass import Pass
from model.ops.panels import BLOCK_BYTES, GROUP, Matrix
from model.ops.reference import TorchOps
from model.ops.sampling import TorchSampling
from model.weights.gguf_blocks import INTEGERS
from model.weights.quantised.pieces import in_groups
from model.weights.stored import StoredTensor

EPSILON = 2.0**-23
"""The spacing of float32 at 1."""
BF16 = 2.0**-8
"""The most that rounding to bfloat16 changes a number, in parts of it."""
LARGEST = 120
"""An activation of 8 bits at most (native/winograd.h)."""
SHARE_OF_16_BITS = 0.25
"""Groups of a row in two planes have 16 bits from so much of its largest number on (native/rows.h)."""
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 64, 200)
BLOCK = 16
NAN = float("nan")


@pytest.fixture(name="ops", scope="module", params=VARIANTS)
def each_variant(request: pytest.FixtureRequest) -> NativeOps:
    ops = make_ops(request.param)
    assert isinstance(ops, NativeOps)
    return ops


REFERENCE = TorchOps(torch.device("cpu"), torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- weights ------------------------------------------------------------------------------------------


def stored_blocks(blocks: np.ndarray, shape: tuple[int, ...], kind: str) -> StoredTensor:
    """As the GGUF reader hands blocks over: their bytes, one after another."""
    quantisation = GGMLQuantizationType[kind]

    def decode(rows: Tensor, width: int) -> Tensor:
        return torch.from_numpy(dequantize(rows.numpy(), quantisation)).view(len(rows), width)

    rows = torch.from_numpy(blocks).view(shape[0], -1)
    return StoredTensor(shape, kind, rows, decode, INTEGERS.get(quantisation))


def stored(weights: Tensor, kind: str) -> StoredTensor:
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in plain:
        return StoredTensor.plain(weights.to(plain[kind]))
    if kind in ("INT4", "INT8"):
        return zero_pointed(weights, int(kind[3:]))
    blocks = quantize(np.ascontiguousarray(weights.numpy()), GGMLQuantizationType[kind]).view(np.uint8)
    return stored_blocks(blocks.copy(), tuple(weights.shape), kind)


def zero_pointed(weights: Tensor, bits: int) -> StoredTensor:
    """As GPTQ and AWQ have it: scale * (u - zero), in groups of 32."""
    groups, most = weights.view(len(weights), -1, GROUP), 2**bits - 1
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / most).half()
    zeros = (-low / scales.float()).round().clamp(0, 256)
    u = (groups / scales.float()[:, :, None]).round() + zeros[:, :, None]
    values = u.clamp(0, most).to(torch.uint8).view(weights.shape)
    return in_groups((len(weights), weights.shape[1]), bits, lambda rows: values[rows], scales, zeros)


def read(ops: NativeOps, matrix: Matrix) -> Tensor:
    """The weights as the products see them: [outputs, inputs]."""
    if matrix.parts:
        return torch.cat([read(ops, part) for part in matrix.parts])
    weights = torch.empty(matrix.outputs, matrix.inputs)
    ops._lib.read_rows(matrix.panels, 0, matrix.outputs, weights.data_ptr())
    return weights


def filled(ops: NativeOps, tensor: StoredTensor) -> tuple[Matrix, Tensor]:
    matrix = ops.matrix(*tensor.shape)
    ops.fill(matrix, tensor)
    return matrix, read(ops, matrix)


def relative_error(ours: Tensor, want: Tensor) -> float:
    return float((ours - want).norm() / want.norm())


def k_quant_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random blocks of a K format: gguf cannot quantise to these. All but the fp16 factors is random."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, size), dtype=np.uint8)
    factors = draw.uniform(0.001, 0.002, (count, 2)).astype(np.float16).view(np.uint8)
    if kind in ("Q3_K", "Q6_K"):
        blocks[:, -2:] = factors[:, :2]
    elif kind == "Q2_K":
        blocks[:, -4:] = factors
    else:
        blocks[:, :4] = factors
    return blocks


class TestPanels:
    @pytest.mark.parametrize("shape", [(16, 32), (48, 32), (16, 1536), (260, 96), (5, 64), (1, 32)])
    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "INT4", "INT8"])
    def test_blocks_keep_their_exact_values(self, ops: NativeOps, kind: str, shape: tuple[int, int]) -> None:
        """No rounding at all: scale times a small integer is exact, one addition rounds as gguf's does."""
        tensor = stored(normal(*shape, seed=shape[0]), kind)
        matrix, ours = filled(ops, tensor)
        assert torch.equal(ours, tensor.dequantise())
        assert matrix.panels is not None
        assert matrix.panels.bits == (8 if kind in ("Q8_0", "INT8") else 4)

    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
    def test_any_block_at_all_is_exact(self, ops: NativeOps, kind: str) -> None:
        """Every value of every nibble or byte, negative scales and subnormal ones included."""
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        draw = np.random.default_rng(1)
        blocks = draw.integers(0, 256, (32 * 8, size), dtype=np.uint8)
        scales = draw.uniform(-2, 2, (len(blocks), 2)) * 10.0 ** draw.integers(-7, 2, (len(blocks), 1))
        factors = scales.astype(np.float16).view(np.uint8)
        blocks[:, :2] = factors[:, :2]
        if kind == "Q4_1":
            blocks[:, 2:4] = factors[:, 2:]
        tensor = stored_blocks(blocks, (32, 8 * GROUP), kind)
        assert torch.equal(filled(ops, tensor)[1], tensor.dequantise())

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_plain_numbers_lose_half_a_step_at_most(self, ops: NativeOps, bits: int, kind: str) -> None:
        """Half a step of the group's range, and what rounding scale and minimum to fp16 adds (2^-11 of each).

        The rounded scale is off by 2^-11 of itself, times up to 2^bits - 1 steps; as much again where the
        largest value falls beyond the last step and is clipped.
        """
        numbers = stored(normal(33, 320, seed=bits) * 0.05 + 0.01, kind)
        want = numbers.dequantise().float()
        matrix = ops.matrix(33, 320)
        NativeOps(ops._lib, 1, bits).fill(matrix, numbers)
        ours = read(ops, matrix)
        assert matrix.panels is not None
        assert matrix.panels.bits == bits
        groups = want.view(33, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        allowed = 0.5 * step + 2.0**-11 * (low.abs() + (high - low)) + 1e-7
        error = (ours.view_as(groups) - groups).abs()
        assert (error <= allowed).all(), float((error / allowed).max())
        assert float((error / step).max()) > 0.4, "the bound is not far from what happens"
        # Uniform within a step: its root mean square is a step over the root of 12.
        assert relative_error(ours, want) == pytest.approx(
            float(step.norm() * math.sqrt(GROUP / 12) / want.norm()), rel=0.15
        )

    def test_a_group_of_equal_weights(self, ops: NativeOps) -> None:
        for value in (0.0, 0.5, -3.0):
            assert torch.equal(
                filled(ops, stored(torch.full((16, 64), value), "F32"))[1], torch.full((16, 64), value)
            )

    @pytest.mark.parametrize(
        ("kind", "bits", "bound"),
        # Measured on these blocks (see the printed figure), with some air. Integers stay what they are in
        # groups of 32, whose scales are rounded to float16; groups of 16 are quantised again.
        [
            ("Q4_K", 4, 0.001),
            ("Q5_K", 8, 0.001),
            ("IQ4_XS", 8, 0.001),
            ("Q6_K", 8, 0.006),
            ("Q2_K", 8, 0.006),
        ],
    )
    def test_k_quants_go_to_the_nearest_panel(
        self, ops: NativeOps, kind: str, bits: int, bound: float
    ) -> None:
        tensor = stored_blocks(k_quant_blocks(kind, 32 * 3), (32, 768), kind)
        matrix, ours = filled(ops, tensor)
        loss = relative_error(ours, tensor.dequantise())
        print(f"{kind} in {bits}-bit panels: relative error {loss:.5f}")
        assert matrix.panels is not None
        assert matrix.panels.bits == bits
        assert 0 < loss < bound

    @pytest.mark.parametrize("kind", ["Q5_0", "Q5_1", "Q3_K", "IQ4_NL"])
    def test_what_stands_in_eight_bits_exactly(self, ops: NativeOps, kind: str) -> None:
        if kind in ("Q5_0", "Q5_1"):
            tensor = stored(normal(32, 768), kind)
        else:
            block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
            tensor = stored_blocks(k_quant_blocks(kind, 32 * 768 // block), (32, 768), kind)
        matrix, ours = filled(ops, tensor)
        assert matrix.panels is not None
        assert matrix.panels.bits == 8
        assert torch.equal(ours, tensor.dequantise())

    def test_parts_fill_one_matrix_each_with_its_own_width(self, ops: NativeOps) -> None:
        matrix = ops.matrix(96, 64)
        parts = ops.split(matrix, (48, 16, 32))
        tensors = [
            stored(normal(part.outputs, 64, seed=i), kind)
            for i, (part, kind) in enumerate(zip(parts, ("Q4_0", "Q8_0", "Q4_1"), strict=True))
        ]
        for part, tensor in zip(parts, tensors, strict=True):
            ops.fill(part, tensor)
        assert [panels.bits for panels in matrix.segments()] == [4, 8, 4]
        assert torch.equal(read(ops, matrix), torch.cat([tensor.dequantise() for tensor in tensors]))

    def test_a_write_stays_within_its_row(self, ops: NativeOps) -> None:
        """Filling row 7 again, with other values, changes row 7 alone."""
        matrix, before = filled(ops, stored(normal(32, 64), "Q4_0"))
        row = normal(1, 64, seed=9)
        ops._lib.write_rows(matrix.panels, 7, 1, row.contiguous().data_ptr())
        after = read(ops, matrix)
        assert (after[7] != before[7]).any()
        others = [i for i in range(32) if i != 7]
        assert torch.equal(after[others], before[others])


# -- activations --------------------------------------------------------------------------------------


def array(address: int, kind: type, *shape: int) -> Tensor:
    pointer = ctypes.cast(address, ctypes.POINTER(kind))
    return torch.from_numpy(np.ctypeslib.as_array(pointer, shape).copy())


def integers_of(rows: InputRows, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of all planes together [count, inputs], and their groups' scales and sums."""
    groups = rows.inputs // GROUP
    scales = array(rows.scales, ctypes.c_float, count, groups)
    sums = array(rows.sums, ctypes.c_float, count, groups)
    # The sum that goes with the weights' minimum is that of these very values.
    for integers in _layouts(rows, count):
        if torch.equal(sums, scales * integers.view(count, groups, GROUP).sum(-1).float()):
            return integers, scales, sums
    raise AssertionError("the sums are not those of the values")


def _layouts(rows: InputRows, count: int) -> Iterator[Tensor]:
    """What the values are, [count, inputs]: in planes of bytes, or as words (rows.h, kWords)."""
    planes = array(rows.values, ctypes.c_int8, count, rows.planes, rows.inputs).int()
    if rows.planes == 1:
        yield planes[:, 0]
        return
    yield 256 * planes[:, 0] + planes[:, 1]
    words = array(rows.values, ctypes.c_int16, count, rows.inputs // 4, 4).int()
    yield words[:, :, [0, 2, 1, 3]].reshape(count, rows.inputs)


def dequantised(quantised: Quantised, count: int) -> Tensor:
    """What the products see of `count` rows: [count, inputs] in float64."""
    rows = quantised.rows
    integers, scales, _ = integers_of(rows, count)
    groups = integers.view(count, -1, GROUP)
    assert int(integers.abs().max()) <= (LARGEST if rows.planes == 1 else LARGEST * 256 + 128)
    return (groups.double() * scales[:, :, None].double()).view(count, rows.inputs)


def quantised(ops: NativeOps, x: Tensor) -> tuple[Quantised, Tensor]:
    """Rows as integers of 8 bits, made by torch in a recording's own buffers, and what they stand for."""
    made = ops._quantised(x.shape[1], "given", False)
    groups = x.double().view(len(x), -1, GROUP)
    scale = (groups.abs().amax(-1) / LARGEST).float()
    steps = (groups / scale.clamp_min(1e-30)[:, :, None]).round().clamp(-LARGEST, LARGEST)
    sums = scale * steps.sum(-1).float()
    values = steps.to(torch.int8)  # [rows, groups, 32]
    rows = made.rows
    for address, source in (
        (rows.values, values),
        (rows.scales, scale),
        (rows.sums, sums),
        (rows.parts, parts_of(steps)),
    ):
        ctypes.memmove(address, source.data_ptr(), source.numel() * source.element_size())
    return made, dequantised(made, len(x))


def parts_of(groups: Tensor) -> Tensor:
    """What rows bring into sums of pairs (native/winograd.h), from integers [rows, groups, 32]."""
    first, second = groups.view(*groups.shape[:2], 4, 2, 4).unbind(3)
    return -(first * second - 8 * first + 120 * second).sum((-1, -2)).int()


def assert_quantised(quantised: Quantised, want: Tensor, error: Tensor | float = 0.0) -> None:
    """Integers of a group of 32 with its own largest value at 120: half a step, and `error` before that."""
    ours = dequantised(quantised, len(want))
    groups = want.double().view(len(want), -1, GROUP)
    slack = torch.as_tensor(error, dtype=torch.float64)
    slack = slack.view(len(want), -1, GROUP) if slack.dim() else slack
    largest = groups.abs().amax(-1, keepdim=True)
    half_a_step = 0.505 * largest / LARGEST
    if quantised.rows.planes == 2:
        # Where the group is not small in its row. The second plane ends at 127 of the 128 that may be left.
        finer = largest >= SHARE_OF_16_BITS * largest.amax(1, keepdim=True)
        half_a_step = torch.where(finer, half_a_step / 128, half_a_step)
    gap = (ours.view_as(groups) - groups).abs()
    allowed = half_a_step + 2 * slack
    assert (gap <= allowed).all(), f"{float((gap / allowed).max())} times what is allowed"
    assert float(gap.max()) > 0


def product_bound(x: Tensor, weight: Tensor) -> Tensor:
    """How far float32 sums over the groups may be off: [rows, outputs].

    Each group adds two products, of which scale * u and the minimum may be twice the weight; the partial
    sums are no larger than the sum of all magnitudes, and each of the 4 roundings a group is EPSILON / 2 of
    them. The integer sums are exact.
    """
    magnitude = x.abs().sum(-1, keepdim=True) * 2 * weight.double().abs().amax(-1)
    return EPSILON * 2 * (x.shape[1] // GROUP + 2) * magnitude


def rows_only(count: int) -> Pass:
    """A pass of which only the number of rows matters."""
    return batch_of([(0, count)])


def batch_of(
    spans: Sequence[tuple[int, int]], seed: int = 0, vocab: int = 100, blocks: int | None = None
) -> Pass:
    return Pass.of(chunks_of(spans, seed, vocab, blocks))


def chunks_of(
    spans: Sequence[tuple[int, int]], seed: int = 0, vocab: int = 100, blocks: int | None = None
) -> Batch:
    """Sequences with rows from start to stop each, in blocks that lie scattered over the pool."""
    draw = random.Random(seed)
    needed = [-(-stop // BLOCK) for _, stop in spans]
    places = draw.sample(range(blocks or sum(needed)), sum(needed))
    chunks = []
    for index, ((start, stop), count) in enumerate(zip(spans, needed, strict=True)):
        table, places = places[:count], places[count:]
        tokens = [draw.randrange(vocab) for _ in range(stop)]
        chunks.append(Chunk(str(index), tokens, start, stop - start, (table,), stop, SamplingParams()))
    return Batch(tuple(chunks))


def run_product(ops: NativeOps, x: Tensor, matrix: Matrix, start: Tensor) -> tuple[Tensor, Tensor]:
    """`start` plus the product, and the rows that the product read."""
    hidden = start.clone()
    with ops.recording(len(x), 1) as tape:
        given, exact = quantised(ops, x)
        ops.add(Hidden(hidden), Product(given, matrix))
    tape.run(rows_only(len(x)))
    return hidden, exact


class TestRowOps:
    @pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "INT4"])
    def test_embed_gives_the_table_s_rows(self, ops: NativeOps, kind: str) -> None:
        """Exactly, the last row of a vocabulary that ends within a panel included."""
        tensor = stored(normal(261, 96), kind)
        table, _ = filled(ops, tensor)
        with ops.recording(70, 1) as tape:
            hidden = ops.embed(None, table)
        for count in (1, 7, 8, 9, 70):
            batch = chunks_of([(0, count)], seed=count, vocab=261)
            tokens = list(batch.chunks[0].token_ids)
            tokens[-1] = 260
            hidden.rows.fill_(NAN)
            tape.run(
                Pass.of(
                    Batch(
                        (Chunk("0", tokens, 0, count, batch.chunks[0].block_tables, count, SamplingParams()),)
                    )
                )
            )
            assert torch.equal(hidden.rows[:count], tensor.dequantise()[tokens])
            assert hidden.rows[count:].isnan().all(), "rows beyond the pass are left alone"

    @pytest.mark.parametrize("selected", [False, True])
    @pytest.mark.parametrize("width", [32, 96, 576, 1536])
    def test_rms_norm(self, ops: NativeOps, width: int, selected: bool) -> None:
        """Half a step of int8; before it float32's sum of squares, far below (a few parts in 2^24)."""
        x = normal(65, width, seed=width) * 3
        x[3] *= 1e-4  # where epsilon counts
        x[4, 32:] = 0
        weight = memory.zeros((width,), torch.float32).copy_(normal(width, seed=1) + 1)
        rows = [64, 0, 3, 3, 4, 17] if selected else list(range(65))
        with ops.recording(65, 65) as tape:
            out = ops.rms_norm(Hidden(x, selected), weight, 1e-5)
        given = rows_only(65)
        tape.run(given.select(np.asarray(rows, dtype=np.int32)) if selected else given)
        want = REFERENCE.rms_norm(x.double(), weight.double(), 1e-5)[rows]
        assert_quantised(out, want, error=want.abs() * EPSILON * 16)

    def test_groups_that_are_small_in_their_row_have_8_bits(self, ops: NativeOps) -> None:
        sizes = torch.tensor([1.0, 0.26, 0.24, 0.0, -0.26, -0.24]).repeat_interleave(GROUP)
        weight = memory.zeros((len(sizes),), torch.float32).copy_(sizes)
        x = normal(3, len(sizes)).clamp(-1, 1)
        x[:, ::GROUP] = 2
        with ops.recording(3, 3) as tape:
            out = ops.rms_norm(ops.select(Hidden(x), None), weight, 1e-5)
        tape.run(rows_only(3).select(np.arange(3, dtype=np.int32)))
        second = integers_of(out.rows, 3)[0].view(3, -1, GROUP) % 256
        assert second.any(-1).tolist() == [[True, True, False, False, True, False]] * 3

    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "INT4", "INT8"])
    @pytest.mark.parametrize("width", [32, 64, 96, 160, 576, 1536])
    def test_linear_with_residual(self, ops: NativeOps, width: int, kind: str) -> None:
        matrix, weight = filled(ops, stored(normal(80, width, seed=width) * 0.1, kind))
        for count in ROWS:
            x, start = normal(count, width, seed=count), normal(count, 80, seed=count + 1)
            x[0] = 0  # a row that has no scale
            ours, exact = run_product(ops, x, matrix, start)
            want = start.double() + REFERENCE.linear(exact, weight.double())
            bound = product_bound(exact, weight) + EPSILON * want.abs() + 1e-12
            assert (((ours - want).abs()) <= bound).all(), (count, float((ours - want).abs().max()))

    @pytest.mark.parametrize("sizes", [(16, 16, 16), (576, 192, 192), (48, 16, 160), (16, 144, 32)])
    def test_linear_of_fused_parts(self, ops: NativeOps, sizes: tuple[int, ...]) -> None:
        """Parts with other widths of bits, whose borders fall within what one task does."""
        matrix = ops.matrix(sum(sizes), 96)
        for i, part in enumerate(ops.split(matrix, sizes)):
            ops.fill(part, stored(normal(part.outputs, 96, seed=i) * 0.1, ("Q4_0", "Q8_0", "Q4_1")[i]))
        weight = read(ops, matrix)
        for count in (1, 3, 15, 16, 17, 64, 129):
            x, start = normal(count, 96, seed=count), torch.zeros(count, sum(sizes))
            ours, exact = run_product(ops, x, matrix, start)
            want = REFERENCE.linear(exact, weight.double())
            assert (((ours - want).abs()) <= product_bound(exact, weight)).all(), count

    @pytest.mark.parametrize("vocabulary", [5, 16, 17, 260, 1000])
    def test_logits_of_the_selected_rows(self, ops: NativeOps, vocabulary: int) -> None:
        """Norm, selection and product; a vocabulary that ends within a panel gives no logit too many."""
        matrix, weight = filled(ops, stored(normal(vocabulary, 64, seed=2), "Q8_0"))
        x = normal(40, 64, seed=3)
        scale = memory.zeros((64,), torch.float32).copy_(normal(64, seed=4))
        with ops.recording(40, 40) as tape:
            chosen = ops.select(Hidden(x), None)
            assert chosen.selected
            normed = ops.rms_norm(chosen, scale, 1e-5)
            logits = ops.logits(normed, matrix)
        assert logits.shape == (40, vocabulary)
        for rows in ([39], [0, 39], [5, 4, 5], list(range(39, -1, -1))):
            logits.fill_(NAN)
            tape.run(rows_only(40).select(np.asarray(rows, dtype=np.int32)))
            exact = dequantised(normed, len(rows))
            want = REFERENCE.linear(exact, weight.double())
            bound = product_bound(exact, weight)
            assert ((logits[: len(rows)] - want).abs() <= bound).all()
            assert logits[len(rows) :].isnan().all()
            torch.testing.assert_close(
                exact, REFERENCE.rms_norm(x.double(), scale.double(), 1e-5)[rows], rtol=0, atol=0.05
            )

    @pytest.mark.parametrize("kinds", [("Q4_0", "Q4_0"), ("Q8_0", "Q8_0"), ("Q4_1", "Q8_0")])
    @pytest.mark.parametrize(("size", "width"), [(32, 32), (96, 64), (160, 576), (1536, 96)])
    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_gated(
        self, ops: NativeOps, activation: str, size: int, width: int, kinds: tuple[str, str]
    ) -> None:
        """Half a step; before it the products' rounding, through functions whose slope is at most 1.13.

        The exponential is right to 2^-21.
        """
        matrix = ops.matrix(2 * size, width)
        for i, part in enumerate(ops.split(matrix, (size, size))):
            ops.fill(part, stored(normal(size, width, seed=i) * 0.3, kinds[i]))
        weight = read(ops, matrix)
        for count in (1, 2, 5, 16, 64, 129):
            x = normal(count, width, seed=count) * 2
            with ops.recording(count, 1) as tape:
                given, exact = quantised(ops, x)
                out = ops.gated(Product(given, matrix), activation)
            tape.run(rows_only(count))
            both = REFERENCE.linear(exact, weight.double())
            gate, up = both.chunk(2, -1)
            gate_error, up_error = product_bound(exact, weight).chunk(2, -1)
            error = 1.13 * gate_error * up.abs() + up_error * gate.abs() + 2.0**-20 * (gate * up).abs()
            # Far below zero the exponent of the gate is off by 2^-22 of itself: of 100 that is 2^-15.
            error += 2.0**-15 * (gate * up).abs() * (activation == "gelu_tanh")
            assert_quantised(out, REFERENCE.gated(both, activation), error + 1e-9)

    def test_silu_far_out(self, ops: NativeOps) -> None:
        """Gates of -1000 and 1000 give zero and the gate itself, not an overflow."""
        matrix = ops.matrix(64, 32)
        gate, up = ops.split(matrix, (32, 32))
        ops.fill(gate, stored(torch.full((32, 32), 1.0), "F32"))
        ops.fill(up, stored(torch.full((32, 32), 1 / 32), "F32"))
        x = torch.tensor([-40.0, 40.0])[:, None].expand(2, 32).contiguous()
        with ops.recording(2, 1) as tape:
            given, _ = quantised(ops, x)
            out = ops.gated(Product(given, matrix), "silu")
        tape.run(rows_only(2))
        ours = dequantised(out, 2)
        assert (ours[0].abs() < 1e-30).all()
        assert torch.allclose(ours[1], torch.full((32,), 1280.0 * 40, dtype=torch.float64), rtol=0.01)


# -- the cache ----------------------------------------------------------------------------------------


def torch_cache(cache: LayerCache) -> LayerCache:
    """A native cache's numbers in the reference's layout and type."""
    blocks, kv_heads, dim = len(cache.keys), cache.kv_heads, cache.head_dim
    keys = cache.keys.view(blocks, kv_heads, dim // 2, BLOCK, 2).permute(0, 3, 1, 2, 4)
    values = cache.values.view(blocks, kv_heads, BLOCK // 2, dim, 2).permute(0, 2, 4, 1, 3)
    shape = (blocks, BLOCK, kv_heads, dim)
    return LayerCache(keys.reshape(shape).float(), values.reshape(shape).float(), kv_heads, dim)


def native_cache(keys: Tensor, values: Tensor) -> LayerCache:
    """The other way round: from [blocks, block size, kv heads, head_dim]."""
    blocks, _, kv_heads, dim = keys.shape
    paired = keys.view(blocks, BLOCK, kv_heads, dim // 2, 2).permute(0, 2, 3, 1, 4)
    tokens = values.view(blocks, BLOCK // 2, 2, kv_heads, dim).permute(0, 3, 1, 4, 2)
    return LayerCache(paired.bfloat16().contiguous(), tokens.bfloat16().contiguous(), kv_heads, dim)


def slots_of(batch: Batch) -> Tensor:
    """All slots that the sequences of a batch have written up to their ends."""
    return torch.tensor(
        [c.block_tables[0][p // BLOCK] * BLOCK + p % BLOCK for c in batch.chunks for p in range(c.stop)]
    )


SPANS = {
    "decodes of all lengths": [(n - 1, n) for n in (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 257, 300)],
    "a whole prompt": [(0, 75)],
    "a late chunk": [(40, 61), (16, 32)],
    "mixed": [(0, 1), (99, 100), (0, 17), (5, 40), (31, 32), (200, 203)],
    # Scores are kept for 256 or 512 tokens at a time; key heads go together where there are many rows.
    "more than a stretch": [(511, 514), (1023, 1025), (1100, 1101)],
    "more than a stretch, many rows": [(511, 514), (1023, 1025), (1100, 1101), (250, 262)],
}
MOST_BLOCKS = 200


class TestCache:
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "dim"), [(4, 2, 32), (9, 3, 64), (3, 3, 96), (4, 1, 128), (2, 1, 256)]
    )
    def test_rotate_and_store(self, ops: NativeOps, heads: int, kv_heads: int, dim: int) -> None:
        """Half a bfloat16 step of the result, and the product's rounding."""
        sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        matrix = ops.matrix(sum(sizes), 64)
        for i, part in enumerate(ops.split(matrix, sizes)):
            ops.fill(part, stored(normal(part.outputs, 64, seed=i) * 0.2, "Q8_0"))
        weight = read(ops, matrix)
        angles = torch.arange(301)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
        rotary = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
        batch = chunks_of(SPANS["mixed"], blocks=60)
        count = batch.num_tokens
        empty = torch.full((60, BLOCK, kv_heads, dim), NAN)
        cache, want_cache = (
            native_cache(empty, empty),
            LayerCache(empty.clone(), empty.clone(), kv_heads, dim),
        )
        with ops.recording(count, 1) as tape:
            given, exact = quantised(ops, normal(count, 64, seed=5))
            queries = ops.rotate_and_store(Product(given, matrix), rotary, cache, None, heads, dim**-0.5)
        tape.run(Pass.of(batch))
        qkv = REFERENCE.linear(exact, weight.double())
        slack = 2 * float(product_bound(exact, weight).max())
        inputs = REFERENCE.prepare(batch, heads, kv_heads)
        want = REFERENCE.rotate_and_store(qkv.float(), rotary, want_cache, inputs, heads, dim**-0.5).flatten(
            1
        )
        ours = torch_cache(cache)
        for got, expected in (
            (queries.rows.float(), want),
            (ours.key_slots[inputs.slots], want_cache.key_slots[inputs.slots]),
            (ours.value_slots[inputs.slots], want_cache.value_slots[inputs.slots]),
        ):
            gap = (got - expected).abs()
            assert (gap <= BF16 * 1.001 * expected.abs() + slack).all(), float(gap.max())
        untouched = torch.ones(60 * BLOCK, dtype=torch.bool)
        untouched[inputs.slots] = False
        assert ours.key_slots[untouched].isnan().all(), "no other slot is written"
        assert ours.value_slots[untouched].isnan().all()

    @pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
    @pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
    @pytest.mark.parametrize(
        ("kv_heads", "group"),
        [(1, 1), (2, 2), (3, 3), (2, 4), (1, 5), (1, 8), (5, 1), (8, 2), (1, 19)],
        ids=lambda n: str(n),
    )
    def test_attention(
        self, ops: NativeOps, kv_heads: int, group: int, dim: int, spans: list[tuple[int, int]]
    ) -> None:
        """Half a step of int8, and the values' weights in bfloat16: if all were off by half a step of it and
        on one side, that part of the largest value; some 0.6 of it, since they are not. The scores (float32
        sums of up to 256 products) and the exponential are a tenth of that.
        """
        heads, blocks = kv_heads * group, MOST_BLOCKS
        batch = chunks_of(spans, seed=dim, blocks=blocks)
        written = slots_of(batch)
        keys = torch.full((blocks, BLOCK, kv_heads, dim), NAN)
        values = keys.clone()
        keys.flatten(0, 1)[written] = normal(len(written), kv_heads, dim, seed=1) * 2
        values.flatten(0, 1)[written] = normal(len(written), kv_heads, dim, seed=2)
        cache = native_cache(keys, values)
        query = (normal(batch.num_tokens, heads * dim, seed=3) / math.sqrt(dim)).bfloat16().contiguous()
        with ops.recording(batch.num_tokens, 1) as tape:
            out = ops.attention(Queries(query), cache, None, None)
        tape.run(Pass.of(batch))
        clean = torch_cache(cache)
        for part in (clean.keys, clean.values):
            part.nan_to_num_(0.0)  # the reference multiplies what is masked
        inputs = REFERENCE.prepare(batch, heads, kv_heads)
        assert isinstance(inputs, TorchInputs)
        want = REFERENCE.attention(query.float().view(-1, heads, dim), clean, inputs, None)
        assert_quantised(
            out, want, error=1.1 * BF16 * float(clean.values.abs().max()) / 2 * torch.ones_like(want)
        )

    def test_attention_is_right_on_average(self, ops: NativeOps) -> None:
        """The bound of the single number is wide; over all of them the error is that of int8 alone, 0.5 %."""
        batch = chunks_of([(0, 200)], blocks=20)
        keys, values = normal(20, BLOCK, 2, 64, seed=1), normal(20, BLOCK, 2, 64, seed=2)
        cache = native_cache(keys, values)
        query = (normal(200, 6 * 64, seed=3) / 8).bfloat16().contiguous()
        with ops.recording(200, 1) as tape:
            out = ops.attention(Queries(query), cache, None, None)
        tape.run(Pass.of(batch))
        inputs = REFERENCE.prepare(batch, 6, 2)
        want = REFERENCE.attention(query.float().view(-1, 6, 64), torch_cache(cache), inputs, None)
        assert relative_error(dequantised(out, 200), want.double()) < 0.008

    def test_scores_that_would_overflow(self, ops: NativeOps) -> None:
        """A score of thousands takes all the weight, whichever block it stands in."""
        batch = chunks_of([(39, 40)], blocks=3)
        values = normal(3, BLOCK, 1, 32, seed=2)
        for place in (0, 15, 16, 31, 39):
            keys = torch.zeros(3, BLOCK, 1, 32)
            slot = batch.chunks[0].block_tables[0][place // BLOCK] * BLOCK + place % BLOCK
            keys.flatten(0, 1)[slot] = 100.0
            cache = native_cache(keys, values)
            query = torch.full((1, 32), 3.0).bfloat16()
            with ops.recording(1, 1) as tape:
                out = ops.attention(Queries(query), cache, None, None)
            tape.run(Pass.of(batch))
            assert_quantised(out, torch_cache(cache).value_slots[slot].view(1, 32), error=1e-6)


# -- sampling -----------------------------------------------------------------------------------------

COMBINATIONS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0, 5.0)
    for top_k in (0, 1, 3, 40, 60000)
    for top_p in (1.0, 0.95, 0.3, 1e-6)
    for min_p in (0.0, 0.05, 1.0)
]


SLACK = 3e-6
"""How far a cumulated share may be off: the exponential is right to 2^-21, its argument to a few in 2^24."""


def interval(logits: Tensor, params: SamplingParams, token: int, slack: float) -> tuple[float, float]:
    """The numbers that draw a token, in float64, with the cuts moved by `slack`; none if it is cut.

    Wider by the share of those tokens that are so close to top-p's cut that rounding decides about them.
    """
    weights = ((logits.double() - logits.double().max()) / params.temperature).exp()
    doubt = 0.0
    if 0 < params.top_k < len(weights):
        weights = weights.masked_fill(weights < weights.topk(params.top_k).values[-1] * (1 - SLACK), 0)
    if params.top_p < 1:
        best = weights.sort(descending=True).values
        place = int((best.cumsum(0) < params.top_p * (1 + slack) * best.sum()).sum())
        floor = best[min(place, len(best) - 1)]
        doubtful = ((weights / floor - 1).abs() < SLACK) & (weights != floor)
        weights = weights.masked_fill(weights < floor * (1 - SLACK), 0)
        doubt = float(weights[doubtful].sum() / weights.sum())
    weights = weights.masked_fill(weights < min(1 - SLACK, params.min_p * (1 + slack)), 0)
    if not weights[token]:
        return 1.0, 0.0
    cumulated = weights.cumsum(0) / weights.sum()
    low = float(cumulated[token - 1]) if token else 0.0
    return low - doubt - SLACK, float(cumulated[token]) + doubt + SLACK


def draws(logits: Tensor, params: SamplingParams, token: int, uniform: float) -> bool:
    """Whether a number draws a token, but for rounding."""
    bounds = [interval(logits, params, token, slack) for slack in (0.0, SLACK, -SLACK)]
    return any(low <= uniform <= high for low, high in bounds)


class TestSampling:
    @pytest.mark.parametrize("vocabulary", [5, 16, 17, 260, 49152])
    @pytest.mark.parametrize("spread", [3.0, 0.0, 0.01])
    def test_the_same_number_draws_the_same_token(
        self, ops: NativeOps, vocabulary: int, spread: float
    ) -> None:
        """Each token is the right one in float64; torch draws the same but where rounding decides.

        Torch ranks in float32, so that the flat distributions of a large vocabulary end elsewhere.
        """
        params = COMBINATIONS if vocabulary < 1000 else COMBINATIONS[::7]
        logits = normal(len(params), vocabulary, seed=vocabulary) * spread
        draw = random.Random(vocabulary)
        uniforms = [draw.random() for _ in params]
        ours = ops.sampling.draw(logits, params, uniforms)
        for row, token in enumerate(ours.tolist()):
            assert draws(logits[row], params[row], token, uniforms[row]), (params[row], uniforms[row], token)
        same = (ours == TorchSampling().draw(logits, params, uniforms)).float().mean()
        assert same >= (0.98 if spread != 0.01 or vocabulary < 1000 else 0.6)

    def test_a_wrong_token_would_be_seen(self) -> None:
        """The check above refuses the neighbours of what torch draws."""
        logits, draw = normal(len(COMBINATIONS), 260) * 3, random.Random(0)
        uniforms = [draw.random() for _ in COMBINATIONS]
        right = TorchSampling().draw(logits, COMBINATIONS, uniforms)
        for row, token in enumerate(right.tolist()):
            assert draws(logits[row], COMBINATIONS[row], token, uniforms[row])
            assert not draws(logits[row], COMBINATIONS[row], (token + 1) % 260, uniforms[row])

    @pytest.mark.parametrize("vocabulary", [5, 16, 17, 260, 49152])
    def test_a_row_s_ends(self, ops: NativeOps, vocabulary: int) -> None:
        """The least and the greatest number in [0, 1); a token without weight is never drawn."""
        logits = normal(2, vocabulary, seed=1)
        logits[:, 0] = logits[:, -1] = -math.inf
        params = [SamplingParams(temperature=1.0)] * 2
        assert ops.sampling.draw(logits, params, [0.0, 1 - 2.0**-53]).tolist() == [1, vocabulary - 2]

    def test_ties_at_a_cut_stay_together(self, ops: NativeOps) -> None:
        logits = torch.zeros(1000, 300)
        logits[:, 100:] = -1.0
        for cut in ({"top_k": 7}, {"top_p": 0.1}, {"min_p": 0.9}):
            params = [SamplingParams(temperature=1.0, **cut)] * 1000
            tokens = ops.sampling.draw(logits, params, [i / 1000 for i in range(1000)])
            assert sorted(set(tokens.tolist())) == list(range(100))

    @pytest.mark.parametrize("vocabulary", [5, 16, 17, 260, 49152])
    @pytest.mark.parametrize("spread", [3.0, 0.0, 40.0])
    def test_summarise(self, ops: NativeOps, vocabulary: int, spread: float) -> None:
        for rows in (1, 3, 33):
            logits = normal(rows, vocabulary, seed=rows) * spread - 20
            scores = ops.sampling.summarise(logits)
            assert scores.best == logits.argmax(-1).tolist()
            want = logits.double().logsumexp(-1)
            assert float((scores.normaliser - want).abs().max()) <= 1e-5 + EPSILON * float(want.abs().max())

    def test_rows_of_a_wider_buffer(self, ops: NativeOps) -> None:
        """As the logits come: rows are padded to whole panels, and the padding may hold anything."""
        padded = torch.full((3, 272), 1e9)
        padded[:, :261] = normal(3, 261)
        logits = padded[:, :261]
        params = [SamplingParams(temperature=1.0, top_p=0.9)] * 3
        scores = ops.sampling.summarise(logits)
        assert scores.best == logits.argmax(-1).tolist()
        assert torch.allclose(scores.normaliser, logits.logsumexp(-1), atol=1e-5)
        want = TorchSampling().draw(logits, params, [0.1, 0.5, 0.9])
        assert torch.equal(ops.sampling.draw(logits, params, [0.1, 0.5, 0.9]), want)


@pytest.mark.parametrize(("kind", "scale"), [("Q8_0", 600.0), ("Q4_0", 9000.0), ("Q8_0", float("nan"))])
def test_scales_beyond_the_panels_are_refused(kind: str, scale: float) -> None:
    """Their minimum would be infinite, and every logit not a number."""
    ops = make_ops("avx2")
    blocks = torch.zeros(16, BLOCK_BYTES[kind], dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    stored = StoredTensor((16, 32), kind, blocks, lambda: torch.zeros(16, 32))
    with pytest.raises(ValueError, match="beyond what panels hold"):
        ops.fill(ops.matrix(16, 32), stored)
