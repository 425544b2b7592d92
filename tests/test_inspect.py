"""`rivulet inspect`: sizes that loading confirms, a speed that decoding confirms, refusals with a reason."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import byte_tokenizer, make_gguf, make_llama
from families import make_family
from harness import OP_SETS, Drive, make_ops
from processes import RIVULET, environment

from model import loader
from model.backend import Wishes, choose_backend
from model.footprint import cache_bytes, measure
from model.ops.base import Ops
from model.weights import open_checkpoint


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [RIVULET, "inspect", *arguments],
        env=environment(COLUMNS="160"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_screen(tiny_folder: Path) -> None:
    done = run(tiny_folder)
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"model {tiny_folder}" in rows
    assert "family llama" in rows
    assert "context 512 tokens" in rows
    assert "attention 2 layers with rotary base 10,000" in rows
    assert any(row.startswith("runs on CPU") for row in rows)
    assert any("layers.*.attention.query" in row and "F32" in row for row in rows)
    assert any("512" in row and "fits" in row for row in rows)


def test_one_json_object(tiny_folder: Path) -> None:
    done = run(tiny_folder, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    model = make_llama(tiny_folder.parent / "again", tie=True, rope_scaling=False, seed=1, head_dim=32)
    assert told["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert told["active_parameters"] == told["parameters"]
    assert [context["tokens"] for context in told["contexts"]] == [512]
    assert told["contexts"][0]["tokens_per_second"] > 0


def test_a_mixture_is_active_in_part(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    config = open_checkpoint(tmp_path).config
    assert config.experts is not None
    footprint = measure(open_checkpoint(tmp_path), make_ops("torch"))
    experts = [part for part in footprint.parts if ".experts." in part.name]
    share = config.experts.per_token / config.experts.count
    assert {part.active for part in experts} == {share}
    passive = sum(part.numbers for part in experts) * (1 - share)
    unread = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.hidden_size
    assert footprint.parameters - footprint.active_parameters == pytest.approx(passive + unread, abs=1)


def held(ops: Ops, weight: Any) -> int:
    """Bytes that a weight really takes."""
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    return sum(ops._lib.panel_bytes(part.outputs, part.inputs, part.bits) for part in weight.segments())


@pytest.mark.parametrize("op_set", OP_SETS)
@pytest.mark.parametrize("kind", ["folder", "Q4_0", "Q8_0", "F16"])
def test_memory_is_what_loading_takes(tmp_path: Path, op_set: str, kind: str) -> None:
    ops = make_ops(op_set)
    model = make_llama(tmp_path, tie=False, head_dim=32)
    path = tmp_path if kind == "folder" else make_gguf(model, tmp_path / "tiny.gguf", kind=kind)
    footprint = measure(open_checkpoint(path), ops)
    loaded = loader.load_model(open_checkpoint(path), ops, 128)
    assert footprint.memory == sum(held(ops, weight) for _, weight in loaded.parameters())
    runner = loader.make_runner(loaded, [4], 16, 4)
    layers = runner.graph.cache.layers
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert cache_bytes(loaded.config, ops, 4 * runner.graph.cache.block_size) == taken


@pytest.mark.alone
def test_the_estimate_is_near_what_decoding_does(smollm2_path: Path) -> None:
    """Within a factor of three, on whatever machine and beside whatever else runs there."""
    done = run(smollm2_path, "--json", "--max-model-len", "1024")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    kinds = {part["name"]: part["kinds"] for part in told["weights"]}
    assert (kinds["embedding"], kinds["layers.*.mlp.up"], kinds["final_norm"]) == (
        ["Q8_0"],
        ["Q4_1"],
        ["F32"],
    )
    (context,) = told["contexts"]
    checkpoint = open_checkpoint(smollm2_path)
    model = loader.load_model(checkpoint, choose_backend(Wishes(), checkpoint.config).ops, 1024)
    drive = Drive(model, blocks=64)
    drive.add("a", [1] * 900, max_tokens=40)
    while not drive.scheduler.num_decoding:
        drive.step()
    started = time.perf_counter()
    steps = 0
    while not drive.scheduler.idle:
        drive.step()
        steps += 1
    measured = steps / (time.perf_counter() - started)
    assert measured / 3 < context["tokens_per_second"] < measured * 3


def edit_config(**changes: object) -> Callable[[Path], object]:
    """A damage to a folder: other fields in its config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a family that is not served": (
        edit_config(model_type="mamba"),
        ("config.json", "model_type is 'mamba'", "llama"),
    ),
    "a rotary type that is not served": (
        edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ("config.json", "rope_type is 'dynamic'"),
    ),
    "a config against its tensors": (
        edit_config(num_hidden_layers=3),
        ("model.safetensors", "model.layers.2.", "is missing"),
    ),
    "more heads than the tensors have": (
        edit_config(num_attention_heads=8),
        ("model.safetensors", "o_proj", "[64, 128]", "[64, 256]"),
    ),
    "a vocabulary larger than the embeddings": (
        lambda folder: edit_config(vocab_size=300)(folder),
        ("model.safetensors", "embed_tokens", "[260, 64]", "[300, 64]"),
    ),
    "a tokenizer larger than the model": (
        lambda folder: make_llama(folder, tie=True, vocab_size=200, head_dim=32),
        ("the tokenizer has 260 tokens, but the model 200",),
    ),
    "no weights at all": (lambda folder: (folder / "model.safetensors").unlink(), ("no *.safetensors",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    damage, words = REFUSED[case]
    byte_tokenizer(tmp_path)
    make_llama(tmp_path, tie=True, head_dim=32)
    damage(tmp_path)
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("rivulet: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
