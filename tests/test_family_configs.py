"""Published configs of every family: what is read agrees with the models that transformers makes of them.

The models are made without memory for weights; names and shapes, windows, scales and rotations are theirs.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import read_or_refusal
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import loader
from model.config import ExpertsConfig, ModelConfig
from model.dialects.hf import from_hf
from model.dialects.hf_names import hf_names
from model.errors import ModelError
from model.rope import Linear, LongRope, Rope, Yarn
from model.rotary import rotary_table
from model.weights.checkpoint import Checkpoint
from model.weights.stored import StoredTensor

WHERE = "/models/some/config.json"

MODELS: dict[str, published.Config] = {
    name: value
    for name, value in vars(published).items()
    if isinstance(value, dict) and "model_type" in value
}


@dataclass
class Shapes:
    """The names and shapes of a model as TensorFiles."""

    shapes: Mapping[str, tuple[int, ...]]
    path: Path = field(default=Path("some"))

    def file_of(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> StoredTensor:
        raise AssertionError("nothing is loaded")


def read(config: Mapping[str, Any], **changes: object) -> ModelConfig:
    """Read a config with some fields changed; None takes one away."""
    changed = {name: value for name, value in {**config, **changes}.items() if value is not None}
    return from_hf(changed if changes else config, None, WHERE)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, nn.Module]:
    """What we read, and transformers' model."""
    return make_pair(MODELS[request.param])


def make_pair(config: published.Config) -> tuple[ModelConfig, nn.Module]:
    theirs = AutoConfig.for_model(**copy.deepcopy({**config}))
    with torch.device("meta"):
        return read(config), AutoModelForCausalLM.from_config(theirs)


def decoder(model: nn.Module) -> nn.Module:
    """The part that has the layers."""
    return getattr(model.model, "language_model", model.model)


def test_the_parameters_are_the_models(pair: tuple[ModelConfig, nn.Module]) -> None:
    """Every tensor has its place and its shape."""
    check_parameters(*pair)


def check_parameters(ours: ModelConfig, theirs: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if ours.tie_embeddings:
        del shapes["lm_head.weight"]
    Checkpoint(ours, Shapes(shapes), hf_names(ours, shapes)).check(loader.parameter_shapes(ours))


@pytest.mark.parametrize(
    "config",
    [
        published.LLAMA2_7B,
        published.QWEN3_06B,
        published.QWEN3_30B_A3B,
        published.SMOLLM3_3B,
        published.GRANITE3_2B,
        published.OLMO2_7B,
        published.GEMMA3_1B,
    ],
    ids=lambda config: config["model_type"],
)
def test_biases_are_the_models(config: published.Config) -> None:
    """Where the config may ask for them it does so for all four matrices of attention."""
    changed = {**config, "attention_bias": True}
    ours, theirs = make_pair(changed)
    assert ours.qkv_bias and ours.output_bias
    check_parameters(ours, theirs)


def test_windows_scales_and_norms_are_the_models(pair: tuple[ModelConfig, nn.Module]) -> None:
    ours, theirs = pair
    layers = decoder(theirs).layers
    assert len(layers) == ours.num_layers
    everywhere = getattr(theirs.config.get_text_config(), "sliding_window", None)
    for layer, module in zip(ours.layers, layers, strict=True):
        assert layer.window == getattr(module.self_attn, "sliding_window", everywhere)
        assert module.self_attn.scaling == pytest.approx(ours.query_scale)
        rotated = getattr(module.self_attn, "use_rope", True)
        assert (layer.rope is not None) == bool(rotated)
    norm = decoder(theirs).norm
    assert getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) == ours.norm_eps


@pytest.mark.parametrize("positions", [300, 4200])
def test_rotations_are_the_models(pair: tuple[ModelConfig, nn.Module], positions: int) -> None:
    """At all positions, of contexts on either side of what Phi-3 calls the original one."""
    ours, theirs = pair
    config, rotary = theirs.config.get_text_config(), decoder(theirs).rotary_emb
    by_kind = hasattr(rotary, "layer_types")
    kinds = config.layer_types if by_kind else [None] * ours.num_layers
    rotary = type(rotary)(config)
    for rope, kind in dict.fromkeys(zip((layer.rope for layer in ours.layers), kinds, strict=True)):
        if rope is None:
            continue
        table = rotary_table(rope, ours.head_dim, positions, torch.device("cpu"))
        given = (torch.zeros(1), torch.arange(positions)[None], *([kind] if by_kind else []))
        # An error of a frequency's last bit grows with the position.
        close = {"rtol": 0, "atol": 1.2e-7 * positions}
        for found, wanted in zip(table.unbind(1), rotary(*given), strict=True):
            torch.testing.assert_close(found[:, : rope.dim // 2], wanted[0, :, : rope.dim // 2], **close)
        stay = table[:, :, rope.dim // 2 :]
        assert bool((stay[:, 0] == 1).all()) and bool((stay[:, 1] == 0).all())


YARNS: list[dict[str, object]] = [
    {"factor": 4.0},
    {"factor": 40.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25},
    {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.5},
    {"factor": 40.0, "mscale": 0.707},
    {"factor": 16.0, "truncate": False},
    {"factor": None},
    {"factor": 1.0},
]


@pytest.mark.parametrize("scaling", YARNS, ids=str)
def test_yarn_is_transformers(scaling: dict[str, object]) -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 2048, "rope_theta": 1e6, **scaling}
    config = {**published.QWEN3_06B, "rope_scaling": None, "rope_parameters": rope}
    theirs = AutoConfig.for_model(**copy.deepcopy(config))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    (layer, *_) = read(config).layers
    assert layer.rope is not None and isinstance(layer.rope.scaling, Yarn)
    assert layer.rope.scaling.attention_factor == pytest.approx(attention_factor)
    angles = torch.arange(300)[:, None] * frequencies
    wanted = torch.stack((angles.cos(), angles.sin()), dim=1) * attention_factor
    table = rotary_table(layer.rope, 128, 300, torch.device("cpu"))
    torch.testing.assert_close(table, wanted, rtol=0, atol=1.2e-7 * 300)


# -- what differs by family ----------------------------------------------------------------------------


def test_qwens_have_biases_and_norms() -> None:
    two, three = read(published.QWEN25_05B), read(published.QWEN3_06B)
    assert (two.qkv_bias, two.output_bias, two.query_key_norm, two.tie_embeddings) == (
        True,
        False,
        None,
        True,
    )
    assert (three.qkv_bias, three.output_bias, three.query_key_norm) == (False, False, "head")
    assert (three.head_dim, three.num_heads * three.head_dim, three.hidden_size) == (128, 2048, 1024)
    assert read(published.QWEN3_06B, attention_bias=True).output_bias


def test_mixtures() -> None:
    qwen, mixtral = read(published.QWEN3_30B_A3B), read(published.MIXTRAL_8X7B)
    assert qwen.experts == ExpertsConfig(count=128, per_token=8, intermediate_size=768, normalised=True)
    assert mixtral.experts == ExpertsConfig(count=8, per_token=2, intermediate_size=14336, normalised=True)
    assert all(layer.experts for layer in (*qwen.layers, *mixtral.layers))
    assert mixtral.layers[0].rope == Rope(1000000.0, 128)
    some = read(published.QWEN3_30B_A3B, decoder_sparse_step=3, mlp_only_layers=[2, 7], norm_topk_prob=None)
    assert [i for i, layer in enumerate(some.layers) if layer.experts] == [*range(5, 48, 3)]
    assert some.experts is not None and not some.experts.normalised
    new = {**published.QWEN3_30B_A3B, "num_local_experts": 64}
    del new["num_experts"]
    assert read(new).experts == replace(qwen.experts, count=64)


def test_granites_multipliers() -> None:
    config = read(published.GRANITE3_2B)
    assert (config.embedding_multiplier, config.attention_scale) == (12.0, 0.015625)
    assert (config.residual_multiplier, config.logits_multiplier) == (0.22, 1 / 8)


def test_where_norms_stand() -> None:
    olmo, gemma = read(published.OLMO2_7B), read(published.GEMMA3_1B)
    assert (olmo.block, olmo.query_key_norm) == ("post_norm", "width")
    assert (gemma.block, gemma.query_key_norm) == ("sandwich", "head")
    assert (gemma.hidden_act, gemma.tie_embeddings) == ("gelu_tanh", True)
    assert gemma.embedding_multiplier == 1152**0.5
    assert gemma.query_scale == 1 / 16


def test_windows_by_layer() -> None:
    gemma = read(published.GEMMA3_1B)
    assert [layer.window for layer in gemma.layers] == ([512] * 5 + [None]) * 4 + [512] * 2
    assert {(layer.window, layer.rope) for layer in gemma.layers} == {
        (512, Rope(10000.0, 256)),
        (None, Rope(1000000.0, 256)),
    }
    types = ["sliding_attention", "full_attention"] * 13
    assert [layer.window for layer in read(published.GEMMA3_1B, layer_types=types).layers] == [512, None] * 13
    qwen = read(published.QWEN25_05B, use_sliding_window=True, sliding_window=77)
    assert [layer.window for layer in qwen.layers] == [None] * 21 + [77] * 3
    assert {layer.window for layer in read(published.QWEN25_05B).layers} == {None}
    assert {layer.window for layer in read(published.MISTRAL_7B).layers} == {4096}
    assert {layer.window for layer in read(published.MISTRAL_7B, sliding_window=None).layers} == {4096}
    assert {layer.window for layer in read(published.MISTRAL_NEMO).layers} == {None}


def test_a_gemma_that_sees() -> None:
    config = read(published.GEMMA3_4B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.dtype, config.eos_token_ids, config.tie_embeddings) == ("bfloat16", (1, 106), True)
    assert config.layers[5].rope == Rope(1000000.0, 256, Linear(8.0))
    assert config.layers[0].rope == Rope(10000.0, 256)


def test_layers_that_are_not_rotated() -> None:
    flags = [1, 1, 0, 1] * 9
    for change in ({}, {"no_rope_layers": None}, {"no_rope_layers": flags}):
        rotated = [layer.rope is not None for layer in read(published.SMOLLM3_3B, **change).layers]
        wanted = flags if change.get("no_rope_layers") else [1, 1, 1, 0] * 9
        assert rotated == [bool(flag) for flag in wanted]


def test_longrope() -> None:
    mini, four = read(published.PHI3_MINI_128K).layers[0].rope, read(published.PHI4_MINI).layers[0].rope
    assert mini is not None and isinstance(mini.scaling, LongRope) and four is not None
    assert (mini.dim, four.dim) == (96, 96)
    assert mini.scaling.original_max_position_embeddings == 4096
    assert mini.scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    for old in ("su", "yarn"):
        again = read(published.PHI3_MINI_128K, rope_scaling={"type": old, **published.FACTORS})
        assert again.layers[0].rope == mini


def test_end_tokens_of_generation_config() -> None:
    ends = {"eos_token_id": [151645, 151643]}
    assert from_hf(published.QWEN25_05B, ends, WHERE).eos_token_ids == (151645, 151643)
    assert from_hf(published.GEMMA3_4B, {"eos_token_id": 1}, WHERE).eos_token_ids == (1,)


# -- what is refused -----------------------------------------------------------------------------------

LONG = {"type": "longrope", **published.FACTORS}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED: list[tuple[published.Config, dict[str, object], str]] = [
    (published.LLAMA2_7B, {"model_type": "mamba"}, "model_type is 'mamba', it must be llama or mistral or"),
    (published.LLAMA2_7B, {"mlp_bias": True}, "mlp_bias is True"),
    (published.LLAMA2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "type is 'dynamic'"),
    (published.LLAMA2_7B, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    (published.LLAMA2_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (published.LLAMA2_7B, {"layer_types": ["sliding_attention"] * 32}, "there is no sliding_window in use"),
    (published.LLAMA2_7B, {"rope_parameters": {"full_attention": {}}}, "rope_parameters is a dict of 1"),
    (published.MISTRAL_7B, {"attention_bias": True}, "attention_bias is True"),
    (published.MISTRAL_7B, {"sliding_window": 0}, "sliding_window is 0"),
    (published.MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    (published.MIXTRAL_8X7B, {"num_local_experts": None}, "num_local_experts is missing"),
    (published.QWEN25_05B, {"attention_bias": False}, "attention_bias is False"),
    (published.QWEN25_05B, {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
    (published.QWEN25_05B, {"layer_types": ["full_attention"] * 23}, "layer_types is a list of 23"),
    (published.QWEN25_05B, {"layer_types": ["chunked_attention"] * 24}, "layer_types is a list of 24"),
    (published.QWEN25_05B, {"layer_types": ["sliding_attention"] * 24}, "no sliding_window in use"),
    (published.QWEN25_05B, {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast is 0.5"),
    (published.QWEN25_05B, {"rope_scaling": {**YARN, "factor": 0}}, "factor is 0"),
    (published.QWEN25_05B, {"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1"),
    (published.QWEN25_05B, {"rope_scaling": {"type": "yarn", "factor": 2}}, "embeddings is missing"),
    (published.QWEN3_30B_A3B, {"mlp_only_layers": [48]}, "mlp_only_layers is a list of 1"),
    (published.QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    (published.QWEN3_30B_A3B, {"num_experts": None}, "num_experts is missing"),
    (published.QWEN3_30B_A3B, {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
    (published.SMOLLM3_3B, {"no_rope_layers": [1]}, "no_rope_layers is a list of 1"),
    (published.PHI3_MINI_128K, {"rope_scaling": {"type": "longrope"}}, "short_factor is missing"),
    (
        published.PHI3_MINI_128K,
        {"rope_scaling": {**LONG, "long_factor": [1.0]}},
        "long_factor is a list of 1",
    ),
    (published.PHI3_MINI_128K, {"rope_scaling": {**LONG, "long_factor": [-1] * 48}}, "of positive numbers"),
    (published.PHI4_MINI, {"partial_rotary_factor": 0.76}, "partial_rotary_factor is 0.76"),
    (published.GRANITE3_2B, {"logits_scaling": 0}, "logits_scaling is 0"),
    (published.GRANITE3_2B, {"residual_multiplier": "x"}, "residual_multiplier is 'x'"),
    (published.GEMMA3_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    (published.GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    (published.GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    (published.GEMMA3_1B, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    (published.GEMMA3_1B, {"rope_parameters": {"rope_theta": 1.0}}, "object of full_attention and sliding"),
    (published.GEMMA3_4B, {"text_config": None}, "text_config is missing"),
    (published.GEMMA3_4B, {"text_config": {"model_type": "llama"}}, "model_type is 'llama'"),
    (
        published.GEMMA3_4B,
        {"text_config": {"final_logit_softcapping": 30.0}},
        "final_logit_softcapping is 30",
    ),
]


@pytest.mark.parametrize(
    ("config", "change", "words"), REFUSED, ids=[f"{c['model_type']}-{words}" for c, _, words in REFUSED]
)
def test_refused(config: published.Config, change: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError) as refusal:
        read(config, **change)
    (sentence,) = str(refusal.value).splitlines()
    assert sentence.startswith(WHERE)
    assert words in sentence
    assert ", it must be " in sentence


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats()
    | st.sampled_from(["", "yarn", "longrope", "llama3", "linear", "sliding_attention", "gelu_pytorch_tanh"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
FIELDS = sorted({name for config in MODELS.values() for name in config} - {"model_type"})


@given(
    config=st.sampled_from([*MODELS.values()]),
    changes=st.dictionaries(st.sampled_from([*FIELDS, "rope_parameters", "layer_types"]), VALUES, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_anything_gives_a_config_or_one_sentence(
    config: published.Config, changes: dict[str, object]
) -> None:
    found = read_or_refusal(lambda: from_hf({**config, **changes}, None, WHERE), WHERE)
    for rope in {layer.rope for layer in (found.layers if found else ())} - {None}:
        assert found is not None and rope is not None
        assert rotary_table(rope, found.head_dim, 2, torch.device("cpu")).isfinite().all()


def test_every_family_is_named_in_a_refusal() -> None:
    with pytest.raises(ModelError) as refusal:
        read(published.LLAMA2_7B, model_type="mamba")
    assert all(str(config["model_type"]) in str(refusal.value) for config in MODELS.values())
