"""Foreign config dialects: what each field becomes, and what is refused by name."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA3_SCALING, read_metadata
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from model.config import LayerConfig, ModelConfig
from model.dialects.gguf import from_gguf
from model.dialects.hf import from_hf
from model.errors import ModelError
from model.rope import Llama3, Rope
from model.weights import open_checkpoint

WHERE = "/models/some/config.json"

# Llama 3.2 1B's config.json as published, but for its lists of ids.
LLAMA32: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA32_READ = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=2048,
    layers=(LayerConfig(Rope(500000.0, 64, Llama3(32.0, 1.0, 4.0, 8192))),) * 16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    hidden_act="silu",
    norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_embeddings=True,
    dtype="bfloat16",
    bos_token_id=128000,
    eos_token_ids=(128001,),
)

GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def refusal(read: Callable[[], object], where: str = WHERE) -> str:
    with pytest.raises(ModelError) as raised:
        read()
    text = str(raised.value)
    assert text.startswith(where)
    assert "\n" not in text
    assert len(text) < 300
    return text


def read_or_refusal(read: Callable[[], ModelConfig], where: str) -> ModelConfig | None:
    try:
        return read()
    except ModelError as error:
        text = str(error)
    assert text.startswith(where)
    assert "\n" not in text
    return None


def test_a_published_config_in_the_old_form() -> None:
    assert from_hf(LLAMA32, None, WHERE) == LLAMA32_READ


def test_the_new_form_says_the_same() -> None:
    config = without(LLAMA32, "rope_scaling", "rope_theta", "torch_dtype")
    config["dtype"] = "bfloat16"
    config["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA32["rope_scaling"]}
    assert from_hf(config, None, WHERE) == LLAMA32_READ


def test_the_oldest_key_for_the_rope_type() -> None:
    scaling = without(LLAMA32["rope_scaling"], "rope_type") | {"type": "llama3"}
    assert from_hf(LLAMA32 | {"rope_scaling": scaling}, None, WHERE) == LLAMA32_READ


def test_rope_parameters_win_over_what_an_old_tool_left_beside_them() -> None:
    config = LLAMA32 | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    read = from_hf(config, None, WHERE)
    assert {layer.rope for layer in read.layers} == {Rope(7.0, 64)}


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default"}, {}, None],
    ids=["full", "theta outside", "empty", "null"],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_plain_rope(name: str, rope: object) -> None:
    read = from_hf(without(LLAMA32, "rope_scaling") | {name: rope}, None, WHERE)
    assert read == replace(LLAMA32_READ, layers=(LayerConfig(Rope(500000.0, 64)),) * 16)


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    optional = (
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "hidden_act",
        "attention_bias",
    )
    config = without(LLAMA32, *optional, "mlp_bias", "tie_word_embeddings", "torch_dtype", "bos_token_id")
    theirs = LlamaConfig.from_dict(config)
    read = from_hf(config, None, WHERE)
    assert read.num_kv_heads == theirs.num_key_value_heads == 32
    assert read.head_dim == theirs.head_dim == 64
    assert read.layers[0].rope == Rope(theirs.rope_parameters["rope_theta"], 64) == Rope(10000.0, 64)
    assert read.tie_embeddings is theirs.tie_word_embeddings is False
    assert read.dtype == "float32"
    assert read.bos_token_id is None


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, LLAMA3_SCALING], ids=["default", "llama3"])
def test_what_transformers_itself_writes(scaling: dict[str, Any], tmp_path: Path) -> None:
    theirs = LlamaConfig(
        vocab_size=321,
        hidden_size=48,
        intermediate_size=96,
        hidden_act="silu",
        sliding_window=None,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=777,
        rms_norm_eps=3e-6,
        rope_parameters={"rope_theta": 1234.0, **scaling},
        tie_word_embeddings=True,
        bos_token_id=5,
        eos_token_id=[6, 7],
        dtype="float16",
    )
    theirs.save_pretrained(tmp_path)
    read_scaling = Llama3(8.0, 1.0, 4.0, 64) if scaling is LLAMA3_SCALING else None
    assert from_hf(json.loads((tmp_path / "config.json").read_text()), None, WHERE) == ModelConfig(
        architecture="llama",
        vocab_size=321,
        hidden_size=48,
        layers=(LayerConfig(Rope(1234.0, 10, read_scaling)),) * 3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        intermediate_size=96,
        hidden_act="silu",
        norm_eps=3e-6,
        max_position_embeddings=777,
        tie_embeddings=True,
        dtype="float16",
        bos_token_id=5,
        eos_token_ids=(6, 7),
    )


@pytest.mark.parametrize(
    ("config_eos", "generation", "read"),
    [
        (2, None, (2,)),
        ([2, 3, 2], None, (2, 3)),
        (None, None, ()),
        ([], None, ()),
        (2, {}, (2,)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {"eos_token_id": 4}, (4,)),
        (2, {"eos_token_id": [4, 5]}, (4, 5)),
        (None, {"eos_token_id": [4, 5]}, (4, 5)),
    ],
)
def test_end_tokens(config_eos: object, generation: dict[str, object] | None, read: tuple[int, ...]) -> None:
    assert from_hf(LLAMA32 | {"eos_token_id": config_eos}, generation, WHERE).eos_token_ids == read


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_under_both_names(name: str, dtype: str) -> None:
    assert from_hf(without(LLAMA32, "torch_dtype") | {name: dtype}, None, WHERE).dtype == dtype


REQUIRED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name: str) -> None:
    assert f"field {name} is missing" in refusal(lambda: from_hf(without(LLAMA32, name), None, WHERE))


COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 10**400, 1.5, 64.0, "64", True, [64], {}, math.nan])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none(name: str, value: object) -> None:
    assert f"field {name} is " in refusal(lambda: from_hf(LLAMA32 | {name: value}, None, WHERE))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf, "1e-5", True, [], 10**400])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_a_number_that_is_none(name: str, value: object) -> None:
    assert f"field {name} is " in refusal(lambda: from_hf(LLAMA32 | {name: value}, None, WHERE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "field model_type is 'bert', it must be llama or mistral or"),
        ({"model_type": ["llama"]}, "field model_type is a list of 1"),
        ({"attention_bias": 1}, "field attention_bias is 1, it must be true or false"),
        ({"mlp_bias": True}, "field mlp_bias is True"),
        ({"mlp_bias": "no"}, "field mlp_bias is 'no'"),
        ({"partial_rotary_factor": 0.5}, "field partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "field hidden_act is 'gelu', it must be silu"),
        ({"tie_word_embeddings": 1}, "field tie_word_embeddings is 1, it must be true or false"),
        ({"torch_dtype": "float64"}, "field torch_dtype is 'float64'"),
        ({"dtype": "float8_e4m3fn"}, "field dtype is 'float8_e4m3fn'"),
        (
            {"num_key_value_heads": 5},
            "field num_attention_heads is 32, it must be a multiple of num_key_value_heads, which is 5",
        ),
        ({"head_dim": 63}, "head_dim is 63, but rotary"),
        (
            {"head_dim": None, "hidden_size": 2050},
            "field hidden_size is 2050, it must be a multiple of 32 heads, or head_dim",
        ),
        ({"head_dim": None, "hidden_size": 16}, "field hidden_size is 16, it must be a multiple of 32"),
        ({"eos_token_id": 128256}, "field eos_token_id is 128256, it must be made of token ids"),
        ({"eos_token_id": [-1]}, "field eos_token_id is a list of 1"),
        ({"eos_token_id": "2"}, "field eos_token_id is '2'"),
        ({"bos_token_id": 1.0}, "field bos_token_id is 1.0"),
        ({"rope_scaling": "llama3"}, "field rope_scaling is 'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "(rope_scaling): field type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2}}, "(rope_scaling): field rope_type is 'ntk'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "(rope_parameters): field rope_theta is 'x'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "field partial_rotary_factor is 0.25"),
        ({"hidden_act": "silu\nsilu" * 100}, "field hidden_act is 'silu\\nsilu"),
    ],
)
def test_refused_by_field(change: dict[str, object], words: str) -> None:
    assert words in refusal(lambda: from_hf(LLAMA32 | change, None, WHERE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 0.5}, "field factor is 0.5"),
        ({"factor": None}, "field factor is missing"),
        ({"low_freq_factor": "1"}, "field low_freq_factor is '1'"),
        ({"high_freq_factor": 1.0}, "field high_freq_factor is 1.0, it must be above low_freq_factor"),
        ({"high_freq_factor": math.nan}, "field high_freq_factor is nan"),
        ({"original_max_position_embeddings": None}, "field original_max_position_embeddings is missing"),
        ({"original_max_position_embeddings": 8192.5}, "field original_max_position_embeddings is 8192.5"),
    ],
)
def test_refused_scaling(change: dict[str, object], words: str) -> None:
    config = LLAMA32 | {"rope_scaling": LLAMA32["rope_scaling"] | change}
    assert words in refusal(lambda: from_hf(config, None, WHERE))


def test_a_bad_generation_config_is_named_as_such() -> None:
    text = refusal(lambda: from_hf(LLAMA32, {"eos_token_id": -5}, WHERE))
    assert "generation_config" in text
    assert "eos_token_id is -5" in text


def test_code_that_a_checkpoint_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_model.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = LLAMA32 | {"auto_map": {"AutoConfig": "evil_model.Config"}, "trust_remote_code": True}
    assert from_hf(config, None, WHERE) == LLAMA32_READ
    assert "evil_model" not in sys.modules


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(LLAMA32)), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    changes=st.dictionaries(st.sampled_from([*LLAMA32, "rope_parameters", "dtype"]), JSON, max_size=4),
    eos=JSON,
)
def test_any_json_gives_a_config_or_one_sentence(changes: dict[str, object], eos: object) -> None:
    read = read_or_refusal(lambda: from_hf(LLAMA32 | changes, {"eos_token_id": eos}, WHERE), WHERE)
    if read is not None:
        assert read.num_heads % read.num_kv_heads == 0
        assert all(0 <= id < read.vocab_size for id in read.eos_token_ids)


@given(changes=st.dictionaries(st.sampled_from([*GGUF, "llama.attention.key_length"]), JSON, max_size=4))
def test_any_metadata_gives_a_config_or_one_sentence(changes: dict[str, object]) -> None:
    read = read_or_refusal(lambda: from_gguf(GGUF | changes, "a.gguf"), "a.gguf")
    assert read is None or read.head_dim % 2 == 0


def test_gguf_metadata() -> None:
    assert from_gguf(GGUF, "a.gguf") == ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        layers=(LayerConfig(Rope(100000.0, 64)),) * 30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        hidden_act="silu",
        norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_embeddings=True,
        dtype="float16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_gguf_defaults() -> None:
    bare = without(GGUF, "llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size")
    read = from_gguf(bare | {"tokenizer.ggml.tokens": ["a", "b", "c"]}, "a.gguf")
    assert (read.num_kv_heads, read.layers[0].rope, read.vocab_size) == (9, Rope(10000.0, 64), 3)


def test_gguf_head_width_of_its_own() -> None:
    widths = {f"llama.{name}": 32 for name in ("attention.key_length", "attention.value_length")}
    assert from_gguf(GGUF | widths | {"llama.rope.dimension_count": 32}, "a.gguf").head_dim == 32


def test_gguf_ends_of_sequence_turn_and_message() -> None:
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    assert from_gguf(GGUF | ends, "a.gguf").eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"general.architecture": "bert"},
            "field general.architecture is 'bert', it must be llama or qwen2 or",
        ),
        ({"general.architecture": None}, "field general.architecture is missing"),
        ({"llama.block_count": None}, "field llama.block_count is missing"),
        ({"llama.context_length": 0}, "field llama.context_length is 0"),
        ({"llama.embedding_length": 1 << 40}, "field llama.embedding_length is 1099511627776"),
        ({"llama.embedding_length": 577}, "field llama.embedding_length is 577, it must be a multiple of 9"),
        ({"llama.feed_forward_length": [1536] * 30}, "field llama.feed_forward_length is a list of 30"),
        ({"llama.attention.head_count": [9] * 30}, "field llama.attention.head_count is a list of 30"),
        (
            {"llama.attention.head_count_kv": 2},
            "field llama.attention.head_count is 9, it must be a multiple of llama.attention.head_count_kv",
        ),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "rms_epsilon is nan"),
        ({"llama.rope.freq_base": -1.0}, "field llama.rope.freq_base is -1.0"),
        (
            {"llama.rope.dimension_count": 32},
            "field llama.rope.dimension_count is 32, it must be the head width 64",
        ),
        ({"llama.attention.value_length": 32}, "field llama.attention.value_length is 32"),
        ({"llama.attention.key_length": 5}, "head_dim is 5, but rotary"),
        ({"llama.expert_count": 8}, "field llama.expert_used_count is missing"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "it must be a whole number from 1 to 8"),
        (
            {"llama.rope.scaling.type": "su"},
            "field llama.rope.scaling.type is 'su', it must be none or linear",
        ),
        ({"llama.rope.scaling.type": "yarn"}, "field llama.rope.scaling.factor is missing"),
        ({"llama.rope.scaling.type": "longrope"}, "tensor rope_factors_long.weight is missing"),
        ({"llama.rope.scale_linear": 0.0}, "field llama.rope.scale_linear is 0.0"),
        (
            {"llama.attention.clamp_kqv": 8.0},
            "field llama.attention.clamp_kqv is 8.0, it must be 0 or absent",
        ),
        ({"llama.attention.sliding_window": -1}, "field llama.attention.sliding_window is -1"),
        ({"llama.attention.sliding_window_pattern": [True] * 29}, "pattern is a list of 29"),
        ({"llama.vocab_size": None}, "field llama.vocab_size is missing"),
        ({"llama.vocab_size": 2, "tokenizer.ggml.tokens": ["a", "b", "c"]}, "it must be at least the 3 of"),
        ({"tokenizer.ggml.eos_token_id": 49152}, "field tokenizer.ggml.eos_token_id is 49152"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "field tokenizer.ggml.eot_token_id is 'x'"),
    ],
)
def test_refused_gguf(change: dict[str, object], words: str) -> None:
    assert words in refusal(lambda: from_gguf(GGUF | change, "a.gguf"), "a.gguf")


@pytest.mark.parametrize("factors", [(1.0,) * 31, (1.0,) * 31 + (0.0,), (1.0,) * 31 + (math.nan,)])
def test_refused_rope_factors(factors: tuple[float, ...]) -> None:
    text = refusal(lambda: from_gguf(GGUF, "a.gguf", factors={"rope_freqs.weight": factors}), "a.gguf")
    assert "rope_freqs.weight must hold 32 positive" in text


def test_the_default_model(smollm2_path: Path) -> None:
    config = open_checkpoint(smollm2_path).config
    assert config == from_gguf(read_metadata(smollm2_path), str(smollm2_path))
    assert replace(config, norm_eps=1e-5) == from_gguf(GGUF, "a.gguf")
    assert config.norm_eps == pytest.approx(1e-5, rel=1e-6)  # a float32 in the file


def test_a_config_does_not_change() -> None:
    for field in fields(ModelConfig):
        with pytest.raises(FrozenInstanceError):
            setattr(LLAMA32_READ, field.name, None)


@pytest.mark.parametrize("change", [{"num_kv_heads": 5}, {"head_dim": 63}, {"dtype": "int8"}, {"layers": ()}])
def test_a_contradictory_config_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(LLAMA32_READ, **change)
