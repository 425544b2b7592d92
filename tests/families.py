"""A tiny random checkpoint of every family, made by transformers: `make_family`.

Widths are multiples of 32 and heads 32 wide, so that every native kernel takes them. Nothing is left at a
value that would hide it: no norm's weight is one, no bias zero, no multiplier one.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from checkpoints import BOS, EOS, IM_END, LLAMA3_SCALING, VOCAB_SIZE
from transformers import PretrainedConfig, PreTrainedModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}


def _plain(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


def longrope(head_dim: int, partial: float = 1.0) -> dict[str, object]:
    """Factors that no two frequencies share; 64 positions are its original context."""
    count = int(head_dim * partial) // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + 0.05 * i for i in range(count)],
        "long_factor": [1.0 + 0.5 * i for i in range(count)],
        "original_max_position_embeddings": 64,
    }


@dataclass(frozen=True)
class Family:
    """How transformers calls a family, and what its tiny model has beside COMMON."""

    config: str
    model: str
    fields: Mapping[str, object] = field(default_factory=dict)
    rope: Mapping[str, object] = field(default_factory=lambda: _plain(10000.0))


COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
NARROW = {"hidden_size": 96, "head_dim": 32}
"""For the families whose heads together may be wider than the hidden state."""
GEMMA3 = {
    **NARROW,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 48,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA3_ROPE = {
    "sliding_attention": _plain(10000.0),
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}

FAMILIES: Mapping[str, Family] = {
    "llama2": Family("LlamaConfig", "LlamaForCausalLM"),
    "llama3": Family("LlamaConfig", "LlamaForCausalLM", NARROW, {"rope_theta": 500000.0, **LLAMA3_SCALING}),
    "llama_bias": Family("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True}),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {**NARROW, "sliding_window": 20}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, _plain(1000000.0)),
    "qwen2_window": Family(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        YARN,
    ),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", NARROW, _plain(1000000.0)),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **NARROW,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        _plain(1000000.0),
    ),
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    ),
    "smollm2": Family("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}, _plain(100000.0)),
    "smollm3": Family(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True},
        _plain(5000000.0),
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 20}),
    "phi3_long": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75},
        longrope(32, 0.75),
    ),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
    ),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", {}, _plain(500000.0)),
    "gemma3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3, GEMMA3_ROPE),
    "gemma3_nested": Family("Gemma3Config", "Gemma3ForConditionalGeneration", GEMMA3, GEMMA3_ROPE),
}
"""By our own name: a family twice where it has two forms. The model_type is the config's."""

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def make_family(
    name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> PreTrainedModel:
    """Save a random model of FAMILIES[name] to `folder` as transformers does, and return it, in eval mode.

    `overrides` are fields of its config, `rope_parameters` among them. The weights are wide enough that
    logits differ clearly; a token's experts are chosen by a wide margin. End tokens are EOS and IM_END.
    """
    config = family_config(name, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, FAMILIES[name].model)(config)
        _randomise(model, dtype)
    model.eval()
    model.generation_config.eos_token_id = [EOS, IM_END]
    model.save_pretrained(folder)
    return model


def family_config(name: str, **overrides: object) -> PretrainedConfig:
    """Give the config of a tiny model."""
    family = FAMILIES[name]
    # A copy: transformers writes into the rotation that it is given, which other families share.
    fields = deepcopy({**COMMON, "rope_parameters": family.rope, **family.fields, **overrides})
    if family.config == "Gemma3Config":
        text = transformers.Gemma3TextConfig(**fields)
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=4,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    return getattr(transformers, family.config)(**fields)


def _randomise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(0, 0.3 if name.endswith("bias") else 0.2)
        _route_by_token(model)
        for parameter in model.parameters():
            # Not model.to(dtype): that would round the rotary frequencies too, which loading does not.
            parameter.data = parameter.data.to(dtype)


def _route_by_token(model: PreTrainedModel) -> None:
    """Let a mixture's router read its choice off the embedding: no two experts are nearly as probable.

    The first numbers of the hidden state, one an expert, are a token's ranking of them; little is added to
    them later, and the router looks at little else.
    """
    routers = {name: p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")}
    if not routers:
        return
    count = len(next(iter(routers.values())))
    embedding = model.get_input_embeddings().weight
    ranks = torch.rand(len(embedding), count).argsort(dim=1).float()
    embedding[:, :count] = ranks - (count - 1) / 2
    for name, parameter in model.named_parameters():
        if name in routers:
            parameter.mul_(0.01)[:, :count] = 3 * torch.eye(count)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[:count].mul_(0.02)
        elif name.endswith("experts.down_proj"):  # [experts, hidden, width]
            parameter[:, :count].mul_(0.02)
        elif name.endswith("post_attention_layernorm.weight"):
            parameter[:count] = 1.0
