"""The CUDA op set's layout, run on the CPU with a plain stand-in for torch's paged flash kernel.

The stand-in reads block tables and lengths as `varlen_attn` documents them; on a machine with a GPU
the same comparison runs with the real kernel.
"""

import math
import random
from pathlib import Path

import pytest
import torch
from checkpoints import make_llama
from harness import Drive, Tiny
from torch import Tensor

import model.ops.cuda
from model import loader
from model.backend import choose_device
from model.errors import ModelError
from model.ops.cuda import CudaOps
from model.weights import open_checkpoint


def plain_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """Attention sequence by sequence, as the documentation of torch's kernel has it."""
    _, page_size, kv_heads, _ = key.shape
    assert page_size % 256 == 0, "FlashAttention 2 demands it"
    assert enable_gqa
    before, after = window_size
    assert after == 0, "causal"
    assert num_splits == 1
    for tensor in (cu_seq_q, seqused_k, block_table):
        assert tensor.dtype == torch.int32
    assert max_q == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert max_k == int(seqused_k.max())
    out = torch.empty_like(query)
    group = query.shape[1] // kv_heads
    for index in range(len(seqused_k)):
        rows = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        length = int(seqused_k[index])
        table = block_table[index, : -(-length // page_size)].long()
        count = rows.stop - rows.start
        keys = key[table].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        values = value[table].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        if before >= 0:  # pages that no row sees are not read
            skipped = max(0, length - count - before) // page_size * page_size
            keys[:skipped], values[:skipped] = 0, 0
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), keys) * scale
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)  # lower right
        if before >= 0:
            mask = mask.triu(length - count - before)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out


def cuda_drive(folder: Path, device: torch.device, **options: object) -> Drive:
    checkpoint = open_checkpoint(folder)
    return Drive(loader.load_model(checkpoint, CudaOps(device, torch.bfloat16), 512), **options)


def device_for_test(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = choose_device("auto")
    if device.type == "cpu":
        monkeypatch.setattr(model.ops.cuda, "paged_attention", lambda: plain_varlen_attn)
    return device


def test_mixed_batches_give_the_references_logits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 against float32: near, and far nearer than any fault of the layout."""
    mixed_batches(tiny, monkeypatch)


def test_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shorter prompts do not reach and longer ones leave behind; without it the logits are others."""
    make_llama(tmp_path, tie=True, seed=1, head_dim=32, window=8)
    tiny = Tiny(tmp_path)
    mixed_batches(tiny, monkeypatch)
    whole = CudaOps.attention
    monkeypatch.setattr(CudaOps, "attention", lambda *given: whole(*given[:-1], None))
    with pytest.raises(AssertionError):
        mixed_batches(tiny, monkeypatch)


def mixed_batches(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = cuda_drive(tiny.path, device_for_test(monkeypatch), blocks=16, budget=40, max_running=6)
    draw = random.Random(1)
    prompts = {f"{i}": [draw.randrange(256) for _ in range(draw.choice([1, 30, 300]))] for i in range(6)}
    outputs = {name: [draw.randrange(256) for _ in range(12)] for name in prompts}
    for name, prompt in prompts.items():
        drive.add(name, prompt, forced=outputs[name])
    drive.run()
    for name, prompt in prompts.items():
        want = tiny.reference_logits([*prompt, *outputs[name]])[len(prompt) - 1 : -1]
        ours = torch.stack(drive.traces[name].logits).float().cpu()
        spread = float(want.std())
        assert float((ours - want).abs().mean()) < 0.05 * spread


def test_the_comparison_sees_a_swapped_block_table(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_for_test(monkeypatch)
    drive = cuda_drive(tiny.path, device, blocks=16)
    draw = random.Random(2)
    prompt = [draw.randrange(256) for _ in range(300)]
    trace = drive.add("a", prompt, forced=[5, 6, 7])
    drive.step()
    drive.scheduler._by_id["a"].block_tables[0].reverse()
    drive.run()
    want = tiny.reference_logits([*prompt, 5])[-1]
    gap = float((trace.logits[1].float().cpu() - want).abs().mean())
    assert not gap < 0.2 * float(want.std())  # or not a number: it read what was never written


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence() -> None:
    with pytest.raises(ModelError, match="no CUDA GPU"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
