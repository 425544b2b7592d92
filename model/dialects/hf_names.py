"""The names that transformers' checkpoints of every family give to tensors.

Where a family was published under several names (experts one by one or stacked, a language model alone or
beside a tower that sees), the names that a folder holds decide.
"""

from collections.abc import Collection, Mapping

from model.config import Block, ModelConfig
from model.weights.names import Fused, NameTable, Stacked
from model.weights.row_order import RowOrder

_Names = Mapping[str, str | Fused | Stacked]

_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
    "layers.#.attention.query": "model.layers.#.self_attn.q_proj.weight",
    "layers.#.attention.key": "model.layers.#.self_attn.k_proj.weight",
    "layers.#.attention.value": "model.layers.#.self_attn.v_proj.weight",
    "layers.#.attention.output": "model.layers.#.self_attn.o_proj.weight",
    "layers.#.attention.query.bias": "model.layers.#.self_attn.q_proj.bias",
    "layers.#.attention.key.bias": "model.layers.#.self_attn.k_proj.bias",
    "layers.#.attention.value.bias": "model.layers.#.self_attn.v_proj.bias",
    "layers.#.attention.output.bias": "model.layers.#.self_attn.o_proj.bias",
    "layers.#.attention.query_norm": "model.layers.#.self_attn.q_norm.weight",
    "layers.#.attention.key_norm": "model.layers.#.self_attn.k_norm.weight",
    "layers.#.mlp.gate": "model.layers.#.mlp.gate_proj.weight",
    "layers.#.mlp.up": "model.layers.#.mlp.up_proj.weight",
    "layers.#.mlp.down": "model.layers.#.mlp.down_proj.weight",
}

_NORMS: Mapping[Block, Mapping[str, str]] = {
    "pre_norm": {
        "layers.#.attention_norm": "model.layers.#.input_layernorm.weight",
        "layers.#.mlp_norm": "model.layers.#.post_attention_layernorm.weight",
    },
    "post_norm": {
        "layers.#.attention_output_norm": "model.layers.#.post_attention_layernorm.weight",
        "layers.#.mlp_output_norm": "model.layers.#.post_feedforward_layernorm.weight",
    },
    "sandwich": {
        "layers.#.attention_norm": "model.layers.#.input_layernorm.weight",
        "layers.#.attention_output_norm": "model.layers.#.post_attention_layernorm.weight",
        "layers.#.mlp_norm": "model.layers.#.pre_feedforward_layernorm.weight",
        "layers.#.mlp_output_norm": "model.layers.#.post_feedforward_layernorm.weight",
    },
}

_QKV = tuple(f"layers.#.attention.{part}" for part in ("query", "key", "value"))
_GATE_UP = tuple(f"layers.#.mlp.{part}" for part in ("gate", "up"))
_PHI3: _Names = {
    **dict.fromkeys(_QKV, Fused("model.layers.#.self_attn.qkv_proj.weight", _QKV)),
    **dict.fromkeys(_GATE_UP, Fused("model.layers.#.mlp.gate_up_proj.weight", _GATE_UP)),
}

_EXPERT = "layers.#.mlp.experts.#"
_EXPERT_GATE_UP = tuple(f"{_EXPERT}.{part}" for part in ("gate", "up"))
_ROUTER = "layers.#.mlp.router"
_EXPERTS: _Names = {
    _ROUTER: "model.layers.#.mlp.gate.weight",
    f"{_EXPERT}.gate": "model.layers.#.mlp.experts.#.gate_proj.weight",
    f"{_EXPERT}.up": "model.layers.#.mlp.experts.#.up_proj.weight",
    f"{_EXPERT}.down": "model.layers.#.mlp.experts.#.down_proj.weight",
}
_MIXTRAL: _Names = {
    _ROUTER: "model.layers.#.block_sparse_moe.gate.weight",
    f"{_EXPERT}.gate": "model.layers.#.block_sparse_moe.experts.#.w1.weight",
    f"{_EXPERT}.up": "model.layers.#.block_sparse_moe.experts.#.w3.weight",
    f"{_EXPERT}.down": "model.layers.#.block_sparse_moe.experts.#.w2.weight",
}
_STACKED: _Names = {
    _ROUTER: "model.layers.#.mlp.gate.weight",
    **dict.fromkeys(_EXPERT_GATE_UP, Stacked("model.layers.#.mlp.experts.gate_up_proj", _EXPERT_GATE_UP)),
    f"{_EXPERT}.down": Stacked("model.layers.#.mlp.experts.down_proj"),
}
"""As transformers 5 has them in memory, and saves them when it is told not to convert."""

_GEMMA3 = ("gemma3", "gemma3_text")
_LESS_ONE = frozenset(
    ("final_norm", "layers.#.attention.query_norm", "layers.#.attention.key_norm", *_NORMS["sandwich"])
)
"""What Gemma 3 stores less one."""

# A buffer that old versions of transformers saved; it follows from the config.
_BUFFERS = r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"
_VISION = r"(model\.)?(vision_tower|multi_modal_projector)\..+"


def hf_names(config: ModelConfig, tensors: Collection[str] = ()) -> NameTable:
    """Where the parameters of a model of this config stand in a transformers checkpoint of these tensors.

    Without tensors: as the family was published.
    """
    names: dict[str, str | Fused | Stacked] = {**_NAMES, **_NORMS[config.block]}
    if config.architecture == "gemma3":
        names |= _beside_vision({**_NAMES, **_NORMS[config.block]}, tensors)
    if config.architecture == "phi3":
        names |= _PHI3
    if config.experts is not None:
        names |= _experts(config, tensors)
    return NameTable(
        names,
        passed_over=_VISION if config.architecture == "gemma3" else _BUFFERS,
        order=RowOrder(config.head_dim, _rotary_dim(config), interleaved=False),
        less_one=_LESS_ONE if config.architecture in _GEMMA3 else frozenset(),
    )


def _experts(config: ModelConfig, tensors: Collection[str]) -> _Names:
    if any(".mlp.experts.gate_up_proj" in name for name in tensors):
        return _STACKED
    return _MIXTRAL if config.architecture == "mixtral" else _EXPERTS


def _beside_vision(names: Mapping[str, str], tensors: Collection[str]) -> _Names:
    """The language model's names as it was published, or as transformers 5 has them in memory."""
    prefix, output = "language_model.model.", "language_model.lm_head.weight"
    if any(name.startswith("model.language_model.") for name in tensors):
        prefix, output = "model.language_model.", "lm_head.weight"
    return {ours: prefix + name.removeprefix("model.") for ours, name in names.items()} | {"output": output}


def _rotary_dim(config: ModelConfig) -> int:
    return next((layer.rope.dim for layer in config.layers if layer.rope is not None), config.head_dim)
