"""Checkpoints: every tensor arrives once and exact, and a corrupt file is one sentence that costs nothing."""

import json
import pickle
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer_metadata, make_gguf, make_llama, read_metadata, tensors_of
from gguf.quants import dequantize, quantize
from hostile import (
    TINY_FIELDS,
    TINY_METADATA,
    entry,
    field,
    nothing_large,
    raw_gguf,
    safetensors_bytes,
    string,
    tensor_entry,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from model.errors import ModelError
from model.rope import Divisors, Llama3
from model.weights import open_checkpoint
from model.weights.gguf import GgufFiles
from model.weights.safetensors import SafetensorsFiles

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def truth(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The parameters of a transformers model under our names."""
    named = {"embedding": model.model.embed_tokens, "final_norm": model.model.norm}
    if not model.config.tie_word_embeddings:
        named["output"] = model.lm_head
    for i, layer in enumerate(model.model.layers):
        named |= {
            f"layers.{i}.attention_norm": layer.input_layernorm,
            f"layers.{i}.attention.query": layer.self_attn.q_proj,
            f"layers.{i}.attention.key": layer.self_attn.k_proj,
            f"layers.{i}.attention.value": layer.self_attn.v_proj,
            f"layers.{i}.attention.output": layer.self_attn.o_proj,
            f"layers.{i}.mlp_norm": layer.post_attention_layernorm,
            f"layers.{i}.mlp.gate": layer.mlp.gate_proj,
            f"layers.{i}.mlp.up": layer.mlp.up_proj,
            f"layers.{i}.mlp.down": layer.mlp.down_proj,
        }
    return {name: module.weight.detach() for name, module in named.items()}


def read(path: Path) -> dict[str, torch.Tensor]:
    pairs = [(name, stored.dequantise()) for name, stored in tensors_of(open_checkpoint(path))]
    tensors = dict(pairs)
    assert len(pairs) == len(tensors)
    return tensors


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def refusal(path: Path, *words: str) -> str:
    """Open and read a checkpoint, which must fail with one sentence that names what it should."""
    with nothing_large(), pytest.raises(ModelError) as raised:
        read(path)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 450
    for word in (path.name, *words):
        assert word in text
    return text


# ---- whole checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_safetensors(tmp_path: Path, tie: bool, shards: int, dtype: torch.dtype) -> None:
    model = make_llama(tmp_path, tie=tie, shards=shards, dtype=dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert_equal(read(tmp_path), truth(model))
    config = open_checkpoint(tmp_path).config
    assert config.dtype == str(dtype).removeprefix("torch.")
    assert config.tie_embeddings is tie
    assert config.eos_token_ids == (257, 259)  # of generation_config.json


def test_shards_without_an_index(tmp_path: Path) -> None:
    model = make_llama(tmp_path, tie=False, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_equal(read(tmp_path), truth(model))


def test_without_a_generation_config(tmp_path: Path) -> None:
    make_llama(tmp_path, tie=False)
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path).config.eos_token_ids == (257,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_gguf(tmp_path: Path, tie: bool, kind: str) -> None:
    model = make_llama(tmp_path / "hf", tie=tie)
    path = make_gguf(model, tmp_path / "tiny.gguf", kind=kind)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    expected = {}
    for name, tensor in truth(model).items():
        if tensor.dim() == 2 and kind in plain:
            tensor = tensor.to(plain[kind])
        elif tensor.dim() == 2:
            code = gguf.GGMLQuantizationType[kind]
            tensor = torch.from_numpy(dequantize(quantize(tensor.numpy(), code), code))
        expected[name] = tensor
    assert_equal(read(path), expected)
    config = open_checkpoint(path).config
    assert config.tie_embeddings is tie
    assert config.dtype == str(plain.get(kind, torch.float16)).removeprefix("torch.")


def test_gguf_says_the_same_config_as_the_folder(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "hf", tie=False, heads=6, kv_heads=3, head_dim=8, hidden_size=96)
    path = make_gguf(model, tmp_path / "tiny.gguf", metadata=byte_tokenizer_metadata())
    theirs, ours = open_checkpoint(tmp_path / "hf").config, open_checkpoint(path).config
    assert ours.norm_eps == pytest.approx(theirs.norm_eps, rel=1e-6)  # a float32 in the file
    assert replace(ours, norm_eps=theirs.norm_eps) == theirs
    assert_equal(read(path), truth(model))


def test_llama3_scaling_in_both_formats(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "hf", tie=True, rope_scaling=True)
    path = make_gguf(model, tmp_path / "tiny.gguf")
    rope = open_checkpoint(tmp_path / "hf").config.layers[0].rope
    assert rope is not None
    scaling = rope.scaling
    assert isinstance(scaling, Llama3)
    assert (scaling.factor, scaling.original_max_position_embeddings) == (8.0, 64)
    config = open_checkpoint(path).config
    rope = config.layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, Divisors)
    factors = torch.tensor(rope.scaling.divisors)
    frequencies = 1 / rope.theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim) / factors
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq)
    assert "rope_freqs" not in "".join(read(path))


def test_every_format_that_gguf_can_dequantise(tmp_path: Path) -> None:
    """Random blocks, of more rows than are decoded at once, against gguf's own dequantisers."""
    tested = set()
    for kind, (block_values, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        data = np.random.default_rng(0).integers(0, 256, (300, 512 // block_values * block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            try:
                expected = torch.from_numpy(dequantize(data, kind))
            except NotImplementedError:
                continue
        if kind.name in ("F32", "F16", "BF16"):
            continue
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in TINY_METADATA.items():
            writer.add_uint32(name, value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with np.errstate(all="ignore"):
            found = GgufFiles(path).read("token_embd.weight").dequantise()
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        tested.add(kind.name)
    assert {
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_XS",
    } <= tested


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_one_tensor_at_a_time(tmp_path: Path, form: str) -> None:
    model = make_llama(tmp_path, tie=False)
    path = tmp_path if form == "safetensors" else make_gguf(model, tmp_path / "tiny.gguf", kind="Q8_0")
    before: weakref.ref[torch.Tensor] | None = None
    for _, stored in tensors_of(open_checkpoint(path)):
        assert before is None or before() is None
        tensor = stored.dequantise()
        before = weakref.ref(tensor)
        del tensor, stored


def test_the_default_model(smollm2_path: Path) -> None:
    start = time.monotonic()
    checkpoint = open_checkpoint(smollm2_path)
    assert time.monotonic() - start < 2
    sizes = {}
    for name, stored in tensors_of(checkpoint):
        tensor = stored.dequantise()
        assert tensor.dtype == torch.float32
        assert bool(tensor.isfinite().all()), name
        sizes[name] = tensor.shape
    assert time.monotonic() - start < 20
    assert len(sizes) == 272
    assert sizes["embedding"] == (49152, 576)
    assert sizes["layers.29.attention.key"] == (192, 576)
    assert sizes["layers.0.mlp.down"] == (576, 1536)
    assert sum(size.numel() for size in sizes.values()) == 134_515_008


def test_the_default_model_against_gguf(smollm2_path: Path) -> None:
    """One layer's matrices, found by gguf's own offsets and dequantised by it."""
    checkpoint = open_checkpoint(smollm2_path)
    tensors = {
        name: stored.dequantise() for name, stored in tensors_of(checkpoint) if name.startswith("layers.7.")
    }
    raw = smollm2_path.read_bytes()
    for theirs, ours, heads in (("attn_q", "attention.query", 9), ("attn_v", "attention.value", None)):
        position = raw.index(f"blk.7.{theirs}.weight".encode()) + len(f"blk.7.{theirs}.weight")
        dimensions, columns, rows, kind, offset = struct.unpack_from("<IQQIQ", raw, position)
        assert (dimensions, kind) == (2, gguf.GGMLQuantizationType.Q4_1)
        table_end = raw.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4 + 8
        start = -(-table_end // 32) * 32 + offset
        data = np.frombuffer(raw, np.uint8, rows * columns // 32 * 20, start).reshape(rows, -1)
        expected = torch.from_numpy(dequantize(data, gguf.GGMLQuantizationType.Q4_1))
        if heads:
            expected = torch.cat([torch.cat((head[0::2], head[1::2])) for head in expected.chunk(heads)])
        assert torch.equal(tensors[f"layers.7.{ours}"], expected)


def test_metadata_is_plain_python(tmp_path: Path) -> None:
    values: dict[str, Any] = byte_tokenizer_metadata() | {
        "a.flag": True,
        "a.float": 0.5,
        "a.flags": [True, False],
    }
    path = make_gguf(make_llama(tmp_path / "hf", tie=True), tmp_path / "tiny.gguf", metadata=values)
    metadata = read_metadata(path)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    for name, value in values.items():
        assert metadata[name] == value
        assert type(metadata[name]) is type(value)
    assert type(metadata["a.flags"][0]) is bool  # type: ignore[index]


def test_metadata_of_every_number_type_and_version(tmp_path: Path) -> None:
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    fields = [field(f"n{kind}", kind, struct.pack("<" + code, 7)) for kind, code in codes.items()]
    fields += [
        field(f"l{kind}", 9, struct.pack(f"<IQ2{code}", kind, 2, 8, 9)) for kind, code in codes.items()
    ]
    for version in (2, 3):
        path = tmp_path / f"v{version}.gguf"
        path.write_bytes(raw_gguf(fields, [], version=version))
        expected = {f"n{kind}": 7 for kind in codes} | {f"l{kind}": [8, 9] for kind in codes}
        assert read_metadata(path) == expected


# ---- names


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_known_leftovers_are_passed_over(tmp_path: Path) -> None:
    model = make_llama(tmp_path, tie=False)
    leftovers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
    }
    resave(tmp_path, lambda tensors: tensors.update(leftovers))
    assert_equal(read(tmp_path), truth(model))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.\u0661.self_attn.q_proj.weight",
        "embed_tokens.weight",
        "lm_head.bias",
        "x\ny",
        "long" * 1000,
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    make_llama(tmp_path, tie=False)
    resave(tmp_path, lambda tensors: tensors.update({name: torch.ones(2)}))
    refusal(tmp_path, "model.safetensors", ascii(name)[1:50].rstrip("'"), "no place in a llama of 2 layers")


def test_an_unknown_gguf_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_gguf(TINY_FIELDS, [entry("blk.0.ffn_up.bias", [4])], data=bytes(16)))
    refusal(path, "'blk.0.ffn_up.bias'", "no place in a llama of 1 layers")


def test_a_layer_too_many(tmp_path: Path) -> None:
    make_llama(tmp_path, tie=False, layers=3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    refusal(tmp_path, "model.layers.2.", "no place in a llama of 2 layers")


def test_a_tied_output_may_stand_in_the_file_again(tmp_path: Path) -> None:
    model = make_llama(tmp_path, tie=True)
    copy = model.lm_head.weight.detach().clone()
    resave(tmp_path, lambda tensors: tensors.update({"lm_head.weight": copy}))
    assert_equal(read(tmp_path), truth(model))


def test_a_tied_output_may_stand_for_the_embedding(tmp_path: Path) -> None:
    model = make_llama(tmp_path, tie=True)
    resave(
        tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    assert_equal(read(tmp_path), truth(model))


@pytest.mark.parametrize("change", ["last value", "shape", "dtype"])
def test_a_tied_output_that_differs(tmp_path: Path, change: str) -> None:
    # More rows than are compared at once, the difference in the last of them.
    model = make_llama(tmp_path, tie=True, vocab_size=5000)
    other = model.lm_head.weight.detach().clone()
    match change:
        case "last value":
            other[-1, -1] += 1
        case "shape":
            other = other[:-1].clone()
        case "dtype":
            other = other.bfloat16()
    resave(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    refusal(tmp_path, "lm_head.weight differs", "tie_word_embeddings")


# ---- folders that are not whole


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Fails the test if it is ever unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pytest.fail, ("unpickled",)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def oversized(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 33)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty, "has no config.json"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (write("config.json", ""), "config.json: is not valid JSON"),
        (write("config.json", '{"model_type": "llama",'), "config.json: is not valid JSON"),
        (write("config.json", b'{"model_type": "\xff"}'), "config.json: is not valid JSON"),
        (write("config.json", '{"vocab_size": ' + "1" * 5000 + "}"), "config.json: is not valid JSON"),
        (write("config.json", '["llama"]'), "config.json: must hold a JSON object"),
        (deep, "config.json: is not valid JSON"),
        (oversized, "config.json: is larger than"),
        (write("generation_config.json", "{"), "generation_config.json: is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors"),
        (only_pickles, "pickled weights are never loaded"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = tmp_path / "folder"
    make_llama(folder, tie=False)
    damage(folder)
    refusal(folder, words)


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00003.safetensors"


def repeat(folder: Path) -> None:
    tensors = load_file(folder / "model-00002-of-00003.safetensors") | load_file(first_shard(folder))
    save_file(tensors, folder / "model-00002-of-00003.safetensors")


def reindex(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: first_shard(folder).unlink(),
            (INDEX, "names model-00001-of-00003.safetensors, which is"),
        ),
        (
            repeat,
            ("model-00002-of-00003.safetensors: tensor '", "stands in model-00001-of-00003.safetensors too"),
        ),
        (
            reindex(lambda names: names.update(more=names["lm_head.weight"])),
            (INDEX, "promises tensor 'more'"),
        ),
        (
            reindex(lambda names: names.update({"lm_head.weight": "../x.safetensors"})),
            (INDEX, "../x.safetensors"),
        ),
        (
            reindex(lambda names: names.update({"lm_head.weight": "x.bin"})),
            (INDEX, "is no name of a .safetensors"),
        ),
        (reindex(lambda names: names.update({"lm_head.weight": 5})), (INDEX, "5 is no name of")),
        (reindex(lambda names: names.clear()), (INDEX, "field weight_map")),
        (write(INDEX, "{"), (INDEX, "is not valid JSON")),
        (write(INDEX, "{}"), (INDEX, "field weight_map")),
    ],
)
def test_shards_that_do_not_fit(
    tmp_path: Path, damage: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    make_llama(tmp_path, tie=False, shards=3)
    damage(tmp_path)
    refusal(tmp_path, *words)


# ---- corrupt safetensors


NORM = "model.norm.weight"
GOOD = {NORM: tensor_entry(0, 16, [4])}
HIGHER = {NORM: tensor_entry(16, 32, [4])}


def test_the_base_of_the_table_is_good(tmp_path: Path) -> None:
    make_llama(tmp_path, tie=False)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(16)))
    files = SafetensorsFiles(tmp_path)
    assert files.shapes == {NORM: (4,)}
    assert torch.equal(files.read(NORM).dequantise(), torch.zeros(4))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        safetensors_bytes(GOOD, bytes(16))[:20],
        safetensors_bytes(GOOD, bytes(15)),
        safetensors_bytes(GOOD, bytes(17)),
        safetensors_bytes(GOOD, bytes(16), length=0),
        safetensors_bytes(GOOD, bytes(16), length=1),
        safetensors_bytes(GOOD, bytes(16), length=1000),
        safetensors_bytes(GOOD, bytes(16), length=99_000_000),
        safetensors_bytes(GOOD, bytes(16), length=1 << 62),
        safetensors_bytes(GOOD, bytes(16), length=(1 << 64) - 1),
        safetensors_bytes(b"{" * 50, bytes(16)),
        safetensors_bytes(b"[" * 100_000, bytes(16)),
        safetensors_bytes(b"\xff" * 50, bytes(16)),
        safetensors_bytes([1], bytes(16)),
        safetensors_bytes({NORM: 5}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(0, 1 << 40, [1 << 38])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(8, 24, [4])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(16, 0, [4])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(-16, 0, [4])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(0, 16, [1 << 62])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(0, 16, [1 << 33, 1 << 33])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(0, 16, [3])}, bytes(16)),
        safetensors_bytes({NORM: tensor_entry(0, 16, [4], "X32")}, bytes(16)),
        safetensors_bytes({**GOOD, "lm_head.weight": tensor_entry(0, 16, [4])}, bytes(16)),
        safetensors_bytes({NORM: {"dtype": "F32", "shape": [4]}}, bytes(16)),
        safetensors_bytes(json.dumps(GOOD).encode()[:-1] + b"," + json.dumps(HIGHER).encode()[1:], bytes(32)),
    ],
)
def test_corrupt_safetensors(tmp_path: Path, content: bytes) -> None:
    make_llama(tmp_path, tie=False)
    (tmp_path / "model.safetensors").write_bytes(content)
    refusal(tmp_path, "model.safetensors: is not a whole safetensors file")


def test_a_safetensors_tensor_of_a_type_that_is_not_served(tmp_path: Path) -> None:
    make_llama(tmp_path, tie=False)
    content = safetensors_bytes({NORM: tensor_entry(0, 16, [16], "I8")}, bytes(16))
    (tmp_path / "model.safetensors").write_bytes(content)
    refusal(tmp_path, "model.safetensors", f"tensor '{NORM}' is of type I8")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_safetensors(tmp_path: Path, part: float) -> None:
    make_llama(tmp_path, tie=False, shards=3)
    whole = first_shard(tmp_path).read_bytes()
    first_shard(tmp_path).write_bytes(whole[: int(len(whole) * part)])
    refusal(tmp_path, "model-00001-of-00003.safetensors: is not a whole safetensors file")


# ---- corrupt GGUF


NORM_ENTRY = entry("output_norm.weight", [4])
TWO = [NORM_ENTRY, entry("blk.0.ffn_norm.weight", [4], offset=32)]


def test_the_base_of_the_gguf_table_is_good(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_gguf(TINY_FIELDS, TWO, data=bytes(48)))
    files = GgufFiles(path)
    assert files.shapes == {"output_norm.weight": (4,), "blk.0.ffn_norm.weight": (4,)}
    assert all(torch.equal(files.read(name).dequantise(), torch.zeros(4)) for name in files.shapes)


def more(*fields: bytes) -> list[bytes]:
    return [*TINY_FIELDS, *fields]


def one(tensor: bytes, data: bytes = bytes(64)) -> bytes:
    return raw_gguf(TINY_FIELDS, [tensor], data=data)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"G", "end of the file in the header"),
        (raw_gguf([], [], magic=b"GGML"), "no GGUF signature"),
        (raw_gguf([], [], version=1), "version 1 "),
        (raw_gguf([], [], version=3 << 24), "little endian"),
        (raw_gguf(TINY_FIELDS, [], num_fields=HUGE), "fields, more than the file can hold"),
        (raw_gguf(TINY_FIELDS, [], num_fields=10_000), "10000 fields, more than"),
        (raw_gguf(TINY_FIELDS, [], num_tensors=HUGE), "tensors, more than the file can hold"),
        (raw_gguf(TINY_FIELDS, [NORM_ENTRY], num_tensors=3, data=bytes(64)), "entry of tensor ''"),
        (
            raw_gguf([string("k", HUGE) + bytes(9)], []),
            "a string of 18446744073709551615 bytes in the metadata",
        ),
        (raw_gguf([string("k", 60_000) + bytes(9)], []), "end of the file in the metadata"),
        (raw_gguf(more(field("k", 8, string("v", HUGE))), []), "metadata field 'k'"),
        (raw_gguf(more(field("k", 8, string("v", 1 << 23))), []), "end of the file in metadata field 'k'"),
        (raw_gguf(more(field("k", 8, string(b"\xff\xfe"))), []), "not UTF-8 in metadata field 'k'"),
        (
            raw_gguf(more(field("k", 13, bytes(8))), []),
            "value type 13, which is unknown or nested in metadata",
        ),
        (
            raw_gguf(more(field("k", 9, struct.pack("<IQ", 9, 1) + bytes(20))), []),
            "value type 9, which is unknown",
        ),
        (
            raw_gguf(more(field("k", 9, struct.pack("<IQ", 4, HUGE))), []),
            "items, more than the file can hold",
        ),
        (
            raw_gguf(more(field("k", 9, struct.pack("<IQ", 10, 20) + bytes(30))), []),
            "end of the file in metadata",
        ),
        (
            raw_gguf(more(field("k", 9, struct.pack("<IQ", 8, HUGE))), []),
            "items, more than the file can hold",
        ),
        (
            raw_gguf(more(field("k", 4, bytes(4)), field("k", 4, bytes(4))), []),
            "a second value in metadata field",
        ),
        (raw_gguf(more(field("general.alignment", 4, struct.pack("<I", 0))), []), "no power of two"),
        (raw_gguf(more(field("general.alignment", 4, struct.pack("<I", 48))), []), "no power of two"),
        (raw_gguf(more(field("general.alignment", 8, string("32"))), []), "no power of two"),
        (one(entry("output_norm.weight", [4], dimensions=0)), "0 dimensions in the table entry of tensor"),
        (one(entry("output_norm.weight", [4], dimensions=5)), "5 dimensions"),
        (one(entry("output_norm.weight", [4], dimensions=HUGE >> 32)), "4294967295 dimensions"),
        (one(entry("output_norm.weight", [HUGE])), "ends within tensor 'output_norm.weight', "),
        (one(entry("output_norm.weight", [HUGE, HUGE, HUGE, HUGE])), "ends within tensor"),
        (one(entry("output_norm.weight", [0, 4])), "shape (4, 0)"),
        (one(entry("output_norm.weight", [30], kind=2)), "shape (30,) that is not made of blocks of 32"),
        (one(entry("output_norm.weight", [4], kind=4)), "tensor type 4"),
        (one(entry("output_norm.weight", [4], kind=999)), "tensor type 999"),
        (one(entry("output_norm.weight", [4], offset=32)), "offset 32 in place of 0"),
        (one(entry("output_norm.weight", [4], offset=HUGE)), "in place of 0"),
        (
            one(entry("output_norm.weight", [4]), data=bytes(15)),
            "ends within tensor 'output_norm.weight', 1 bytes short",
        ),
        (raw_gguf(TINY_FIELDS, [NORM_ENTRY, entry("x", [4])], data=bytes(64)), "offset 0 in place of 32"),
        (raw_gguf(TINY_FIELDS, [NORM_ENTRY, NORM_ENTRY], data=bytes(64)), "a second entry in the table"),
        (one(entry("blk.0.attn_q.weight", [4])), "has shape [4], but its config says [32, 32]"),
        (one(entry("blk.0.attn_k.weight", [4, 4])), "has shape [4, 4], but its config says [32, 32]"),
        (one(entry("blk.1.ffn_norm.weight", [4])), "no place in a llama of 1 layers"),
        (one(entry("rope_freqs.weight", [4])), "rope_freqs.weight must hold 8 positive"),
        (raw_gguf(more(field("split.count", 2, struct.pack("<H", 3))), []), "one of 3 parts"),
        (raw_gguf(TINY_FIELDS[1:], []), "field general.architecture is missing"),
    ],
)
def test_corrupt_gguf(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    refusal(path, words)


def test_gguf_truncated_at_every_byte_of_its_header(tmp_path: Path) -> None:
    whole = raw_gguf(more(field("list", 9, struct.pack("<IQ", 8, 2) + string("ab") * 2)), TWO, data=bytes(48))
    path = tmp_path / "short.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"^\S*short\.gguf: .*$"):
            open_checkpoint(path)


def test_gguf_truncated_in_its_tensors(tmp_path: Path) -> None:
    path = make_gguf(make_llama(tmp_path / "hf", tie=False), tmp_path / "tiny.gguf", kind="Q8_0")
    padding = -(260 * 64 // 32 * 34) % 32  # of the last tensor, which is no loss
    size = path.stat().st_size - padding
    with path.open("r+b") as file:
        for short in (1, 1000, size // 2):
            file.truncate(size - short)
            refusal(path, f"{short} bytes short", "truncated")


def test_metadata_of_a_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw_gguf(TINY_FIELDS, [], num_fields=HUGE))
    with pytest.raises(ModelError, match="more than the file can hold"):
        read_metadata(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Bomb()))
    refusal(tmp_path / "model.bin", "neither a .gguf or .pth file nor a folder")
    refusal(tmp_path / "nothing.gguf", "does not exist")
    (tmp_path / "folder.gguf").mkdir()
    refusal(tmp_path / "folder.gguf", "has no config.json")


# ---- random damage

FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6)
FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(content: bytes, region: int, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content)
    for position, mask in flips:
        changed[position % region] ^= mask
    return bytes(changed)


def read_or_refuse(path: Path) -> None:
    """Only a ModelError of one line that names the file may leave; anything else fails the test by itself."""
    text = path.name
    with nothing_large():
        try:
            read(path)
        except ModelError as error:
            text = str(error)
    assert "\n" not in text
    assert path.name in text


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fuzz")
    model = make_llama(folder, tie=False, rope_scaling=True, layers=1)
    return make_gguf(model, folder / "tiny.gguf", kind="Q8_0").read_bytes()


@FUZZ
@given(flips=FLIPS)
def test_flipped_bytes_of_a_gguf_header(
    tmp_path: Path, tiny_gguf: bytes, flips: list[tuple[int, int]]
) -> None:
    region = tiny_gguf.index(b"output.weight") + 45
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged(tiny_gguf, region, flips))
    read_or_refuse(path)


@pytest.fixture(scope="module")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    make_llama(folder, tie=False, rope_scaling=True, layers=1, shards=2)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@FUZZ
@given(number=st.integers(0, 4), flips=FLIPS)
@example(number=0, flips=[(0, 1)])
def test_flipped_bytes_of_a_folder(
    tmp_path: Path, tiny_shards: dict[str, bytes], number: int, flips: list[tuple[int, int]]
) -> None:
    assert len(tiny_shards) == 5
    for name, content in tiny_shards.items():
        (tmp_path / name).write_bytes(content)
    name = sorted(tiny_shards)[number]
    content = tiny_shards[name]
    header = 8 + struct.unpack_from("<Q", content)[0] if name.endswith(".safetensors") else len(content)
    (tmp_path / name).write_bytes(damaged(content, header, flips))
    read_or_refuse(tmp_path)
