"""GGUF's block formats: decoded bit for bit as the `gguf` package does, and what serving them loses."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import make_llama
from gguf.quants import _type_traits, dequantize
from gguf_files import K_FORMATS, quantise_k, write_gguf
from harness import Drive, make_ops
from test_oracle import random_tokens
from torch import Tensor

from model import loader
from model.backend import VARIANTS
from model.weights import open_checkpoint
from model.weights.gguf_blocks import _DECODERS, _VALUES_AT_ONCE, INTEGERS, decode_rows

KINDS = {kind.name: kind for kind in gguf.GGMLQuantizationType}
DECODED = [kind.name for kind in _type_traits if kind.name != "BF16"]
"""Every block format that the package reads; what it has for BF16 are plain numbers to us."""


def random_blocks(kind: str, rows: int, width: int) -> np.ndarray:
    """Any bytes at all are valid blocks, scales that are no numbers among them."""
    values, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    return np.random.default_rng(7).integers(0, 256, (rows, width // values * size), dtype=np.uint8)


def bits(numbers: Tensor) -> Tensor:
    """To compare by, all not-a-numbers being one, and both zeros."""
    return torch.where(numbers.isnan(), torch.nan, numbers + 0.0).view(torch.int32)


def test_the_decoders_here_are_of_formats_that_the_package_reads() -> None:
    ours = {kind.name for kind in (*_DECODERS, *INTEGERS)}
    assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_FORMATS} < ours < set(DECODED)
    assert not {*_DECODERS} & {*INTEGERS}
    assert len(DECODED) >= 23


@pytest.mark.parametrize("kind", DECODED)
def test_any_block_is_decoded_as_the_package_does(kind: str) -> None:
    width, rows = 256 * 130, 5
    assert width * rows > _VALUES_AT_ONCE  # and so in more than one go, the last of which is shorter
    blocks = random_blocks(kind, rows, width)
    with np.errstate(all="ignore"):
        want = torch.from_numpy(dequantize(blocks, KINDS[kind])).float()
    ours = decode_rows(KINDS[kind], torch.from_numpy(blocks), width)
    assert torch.equal(bits(ours), bits(want))
    # Rows of a larger tensor, as experts and fused matrices are.
    some = decode_rows(KINDS[kind], torch.from_numpy(blocks)[torch.tensor([3, 1])], width)
    assert torch.equal(bits(some), bits(want[[3, 1]]))


@pytest.mark.parametrize("kind", K_FORMATS)
def test_the_tests_own_quantiser_is_one(kind: str) -> None:
    """Else what is measured with it would say nothing: its error is of the format's step."""
    numbers = np.random.default_rng(1).normal(size=(8, 512)).astype(np.float32)
    decoded = dequantize(quantise_k(numbers, kind), KINDS[kind])
    step = 2 * 2.2 / 2 ** K_FORMATS[kind][1]  # of normal numbers in groups of 16 or 32
    assert np.sqrt(np.mean((decoded - numbers) ** 2)) < step / 2


LOSS = {
    "F32": 0.15,
    "F16": 0.15,
    "BF16": 0.15,
    "Q8_0": 0.13,
    "Q4_0": 0.12,
    "Q4_1": 0.12,
    "Q5_0": 0.12,
    "Q5_1": 0.12,
    "Q2_K": 0.16,
    "Q3_K": 0.16,
    "Q4_K": 0.13,
    "Q5_K": 0.15,
    "Q6_K": 0.16,
}
"""Bound of the relative error of logits by the format of all matrices: measured, 0.07 to 0.12, with air.

Nearly all of it is the activations', which these wide random weights blow up; a weight's own is in
test_native_kernels.py.
"""


def logits_of(path: Path, op_set: str) -> Tensor:
    """Of 40 steps with given tokens: [steps, vocabulary]."""
    model = loader.load_model(open_checkpoint(path), make_ops(op_set), 128)
    ids = random_tokens(100, 260, seed=1)
    drive = Drive(model)
    trace = drive.add("a", ids[:60], forced=ids[60:])
    drive.run()
    return torch.stack(trace.logits).double()


@pytest.fixture(scope="module", params=LOSS)
def of_a_kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Tensor]:
    """A Llama whose matrices are all of one format, and its logits in float32."""
    folder = tmp_path_factory.mktemp("kind")
    model = make_llama(
        folder, tie=False, hidden_size=256, intermediate_size=512, head_dim=64, heads=4, kv_heads=2, seed=5
    )
    path = write_gguf(model, folder / "model.gguf", kind=request.param)
    return request.param, path, logits_of(path, "torch")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_kernels_lose(of_a_kind: tuple[str, Path, Tensor], variant: str) -> None:
    """Against float32 with the same dequantised weights: what a user loses beyond the file's own rounding."""
    kind, path, want = of_a_kind
    error = float((logits_of(path, variant) - want).norm() / want.norm())
    assert 0 < error <= LOSS[kind], error
