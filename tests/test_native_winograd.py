"""Many rows by Winograd's inner product (native/winograd.h): the bits that a row alone has.

Elsewhere, too, the variants that multiply pairs run every test of the kernels and of the rows' bits.
"""

import ctypes

import pytest
import torch
from harness import make_ops
from test_native_kernels import array, filled, integers_of, normal, parts_of, quantised, rows_only, stored
from torch import Tensor

from model import memory
from model.ops.native import NativeOps
from model.ops.native_handles import Hidden, Product
from model.ops.panels import GROUP, Matrix

LEAST = 32
"""Rows that are multiplied so (kLeastWinogradRows)."""
COUNTS = (LEAST - 1, LEAST, LEAST + 1, 36, 64, 127, 128, 129, 160, 165, 300)


@pytest.fixture(name="ops", scope="module", params=["avx512", "avx512_vnni"])
def those_that_multiply_pairs(request: pytest.FixtureRequest) -> NativeOps:
    ops = make_ops(request.param)
    assert isinstance(ops, NativeOps)
    return ops


def product(ops: NativeOps, matrix: Matrix, x: Tensor, add_to_part: int = 0) -> Tensor:
    """Rows by a matrix; what row 7 brings into its first group's sums may be changed before."""
    out = torch.zeros(len(x), matrix.outputs)
    with ops.recording(len(x), 1) as tape:
        given, _ = quantised(ops, x)
        ops.add(Hidden(out), Product(given, matrix))
        if add_to_part:
            parts = ctypes.cast(given.rows.parts, ctypes.POINTER(ctypes.c_int32))
            parts[7 * given.rows.inputs // GROUP] += add_to_part
    tape.run(rows_only(len(x)))
    return out


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "INT4"])
@pytest.mark.parametrize("inputs", [32, 64, 96, 576, 608, 1536])
def test_rows_together_as_each_alone(ops: NativeOps, kind: str, inputs: int) -> None:
    """80 outputs end in a panel without a neighbour; from 608 inputs on the groups go in pieces."""
    matrix, _ = filled(ops, stored(normal(80, inputs, seed=1), kind))
    x = normal(max(COUNTS), inputs, seed=2) * torch.linspace(-9, 9, max(COUNTS)).exp()[:, None]
    alone = torch.cat([product(ops, matrix, row[None]) for row in x])
    for count in COUNTS:
        together = product(ops, matrix, x[:count])
        assert torch.equal(together.view(torch.int32), alone[:count].view(torch.int32)), count


def test_the_ends_of_the_range(ops: NativeOps) -> None:
    """Inputs at 120 and -120 with weights at 0 and 15: sums of pairs reach 255 and -128, exactly."""
    ends = torch.tensor([-120.0, 120.0, -120.0, 120.0, 0.0, 1.0])
    draw = torch.Generator().manual_seed(3)
    x = ends[torch.randint(6, (64, 64), generator=draw)]
    x[0], x[1] = 120, -120
    weights = torch.randint(2, (32, 64), generator=draw) * 15.0
    weights[0], weights[1] = 15, 0
    weights[2:, ::GROUP], weights[2:, 1::GROUP] = 0, 15  # so that Q4_1's scale is 1 and its minimum 0
    matrix, read = filled(ops, stored(weights, "Q4_1"))
    assert torch.equal(read, weights)
    x[:, ::GROUP] = 120  # so that each scale is 1
    assert torch.equal(product(ops, matrix, x), x @ weights.T)


@pytest.mark.parametrize("inputs", [32, 96, 576])
def test_what_a_row_brings(ops: NativeOps, inputs: int) -> None:
    one = memory.zeros((inputs,), torch.float32).fill_(1.0)
    with ops.recording(9, 1) as tape:
        out = ops.rms_norm(Hidden(normal(9, inputs)), one, 1e-5)
    tape.run(rows_only(9))
    parts = array(out.rows.parts, ctypes.c_int32, 9, inputs // GROUP)
    assert torch.equal(parts, parts_of(integers_of(out.rows, 9)[0].view(9, -1, GROUP)))


def test_what_another_row_brings_would_be_seen(ops: NativeOps) -> None:
    """Changed by one, a part changes its own row, from the number of rows on that go by pairs."""
    matrix, _ = filled(ops, stored(normal(32, 64), "Q4_0"))
    for count, seen in ((LEAST - 1, []), (LEAST, [7])):
        x = normal(count, 64)
        changed = (product(ops, matrix, x) != product(ops, matrix, x, add_to_part=1)).any(1)
        assert changed.nonzero().flatten().tolist() == seen
