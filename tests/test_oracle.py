"""Teacher-forced oracle: our logits at every step against transformers' uncached float32 forward.

The tolerance is ten times the gap between the reference in float32 and in float64 (the noise floor of
the arithmetic itself), measured on the same tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import byte_tokenizer, make_gguf, make_llama
from harness import Drive, Tiny
from torch import Tensor

from model import loader
from model.ops.reference import TorchOps
from model.weights import open_checkpoint

SHAPES = {
    "tied": {"tie": True, "rope_scaling": False},
    "untied": {"tie": False, "rope_scaling": False},
    "llama3 rope": {"tie": True, "rope_scaling": True},
    "one kv head": {"tie": False, "rope_scaling": True, "heads": 6, "kv_heads": 1, "hidden_size": 96},
    "no groups": {"tie": True, "rope_scaling": False, "heads": 4, "kv_heads": 4},
    "wide heads": {"tie": True, "rope_scaling": False, "heads": 2, "kv_heads": 1, "head_dim": 64},
    "gelu": {"tie": True, "rope_scaling": False, "hidden_act": "gelu_pytorch_tanh"},
    "window": {"tie": False, "rope_scaling": False, "window": 20},
}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("shape")
    make_llama(folder, seed=7, **SHAPES[request.param])
    return Tiny(folder)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def noise_floor(tiny: Tiny, token_ids: Sequence[int]) -> float:
    """The largest gap between the reference in float32 and in float64."""
    exact = copy.deepcopy(tiny.reference).double()
    with torch.no_grad():
        logits = exact(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return float((logits - tiny.reference_logits(token_ids).double()).abs().max())


def errors_by_step(ours: Sequence[Tensor], reference: Tensor, prompt_length: int) -> list[float]:
    """The largest error of each output step's logits."""
    expected = reference[prompt_length - 1 :]
    return [float((row - want).abs().max()) for row, want in zip(ours, expected, strict=False)]


def test_every_logit_of_every_step_is_the_references(shaped: Tiny) -> None:
    prompt = random_tokens(37, shaped.config.vocab_size, seed=1)
    output = random_tokens(60, shaped.config.vocab_size, seed=2)
    reference = shaped.reference_logits([*prompt, *output])
    drive = shaped.drive()
    trace = drive.add("a", prompt, forced=output)
    drive.run()
    assert len(trace.logits) == len(output)
    errors = errors_by_step(trace.logits, reference, len(prompt))
    assert max(errors) <= 10 * noise_floor(shaped, [*prompt, *output]), errors


@pytest.mark.parametrize("window", [1, 20])
@pytest.mark.parametrize("chunk", [1, 3, 16, 37])
def test_a_window_moves_with_every_row(chunk: int, window: int, tmp_path: Path) -> None:
    """Chunks that begin before, within and behind the window of their rows; two sequences at once."""
    make_llama(tmp_path, tie=True, seed=7, window=window)
    tiny = Tiny(tmp_path)
    drive = tiny.drive(budget=chunk + 2)
    given = {name: random_tokens(90, tiny.config.vocab_size, seed) for seed, name in enumerate("ab")}
    traces = {name: drive.add(name, ids[:50], forced=ids[50:]) for name, ids in given.items()}
    drive.run()
    for name, ids in given.items():
        errors = errors_by_step(traces[name].logits, tiny.reference_logits(ids), 50)
        assert max(errors) <= 10 * noise_floor(tiny, ids), errors


def test_a_window_of_another_size_would_be_seen(tmp_path: Path) -> None:
    make_llama(tmp_path, tie=True, seed=7, window=20)
    tiny = Tiny(tmp_path)
    for layer in tiny.model.layers:
        layer.attention.window = 21
    layers = tuple(replace(layer, window=21) for layer in tiny.config.layers)
    tiny.model.config = replace(tiny.config, layers=layers)
    drive = tiny.drive()
    ids = random_tokens(60, tiny.config.vocab_size, seed=1)
    trace = drive.add("a", ids[:50], forced=ids[50:])
    drive.run()
    errors = errors_by_step(trace.logits, tiny.reference_logits(ids), 50)
    assert min(errors) > 100 * noise_floor(tiny, ids)


def test_the_tolerance_sees_a_wrong_position(shaped: Tiny) -> None:
    """The inverse: shifting every rotation by one position within a chunk is far beyond the tolerance."""
    prompt = random_tokens(37, shaped.config.vocab_size, seed=1)
    reference = shaped.reference_logits(prompt)
    ((rope, original),) = shaped.model.rotary.items()
    shaped.model.rotary[rope] = original.clone()
    shaped.model.rotary[rope][36] = original[37]
    try:
        drive = shaped.drive()
        trace = drive.add("a", prompt, forced=[0])
        drive.run()
    finally:
        shaped.model.rotary[rope] = original
    (error,) = errors_by_step(trace.logits, reference, len(prompt))
    assert error > 100 * noise_floor(shaped, prompt)


def test_greedy_tokens_are_the_references(shaped: Tiny) -> None:
    prompt = random_tokens(20, shaped.config.vocab_size, seed=3)
    drive = shaped.drive()
    trace = drive.add("a", prompt, max_tokens=24)
    drive.run()
    floor = noise_floor(shaped, [*prompt, *trace.tokens])
    logits = shaped.reference_logits([*prompt, *trace.tokens])[len(prompt) - 1 : -1]
    for row, token in zip(logits, trace.tokens, strict=True):
        assert float(row.max() - row[token]) <= 2 * 10 * floor  # equal, or a tie within the tolerance


def test_a_gguf_file_gives_the_same_logits(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    byte_tokenizer(folder)
    reference = make_llama(folder, tie=False, rope_scaling=True, seed=9)
    tiny = Tiny(folder)
    path = make_gguf(reference, tmp_path / "model.gguf") or tmp_path / "model.gguf"
    checkpoint = open_checkpoint(path)
    ops = TorchOps(torch.device("cpu"), torch.float32)
    model = loader.load_model(checkpoint, ops, max_model_len=512)
    prompt = random_tokens(50, tiny.config.vocab_size, seed=4)
    output = random_tokens(10, tiny.config.vocab_size, seed=5)
    drive = Drive(model)
    trace = drive.add("a", prompt, forced=output)
    drive.run()
    errors = errors_by_step(trace.logits, tiny.reference_logits([*prompt, *output]), len(prompt))
    assert max(errors) <= 10 * noise_floor(tiny, [*prompt, *output])


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tiny:
    """The real model in float32 on both sides, with the same dequantised weights."""
    return Tiny(smollm2_path, max_model_len=1024)


def test_smollm2_is_the_references_at_every_step(smollm2: Tiny) -> None:
    prompt = random_tokens(100, 40_000, seed=6)
    output = random_tokens(40, 40_000, seed=7)
    reference = smollm2.reference_logits([*prompt, *output])
    drive = smollm2.drive(budget=48)
    trace = drive.add("a", prompt, forced=output)
    others = [
        drive.add(f"n{i}", random_tokens(30 + 7 * i, 40_000, seed=10 + i), max_tokens=10) for i in range(3)
    ]
    drive.run()
    assert all(other.done for other in others)
    errors = errors_by_step(trace.logits, reference, len(prompt))
    floor = noise_floor(smollm2, [*prompt, *output])
    assert max(errors) <= 10 * floor, (floor, errors)
