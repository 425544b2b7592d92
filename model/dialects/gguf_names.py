"""The names that GGUF files give to tensors, for every architecture that `gguf.py` reads.

The names are the `gguf` package's (`TENSOR_NAMES`); what is stored in another form than it was trained in is
what llama.cpp's converter says: rows of queries and keys by neighbours, experts stacked, halves fused.
"""

from collections.abc import Collection, Mapping

from model.config import ModelConfig
from model.weights.names import Fused, NameTable, Stacked
from model.weights.row_order import RowOrder

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
QUERY_BIAS, QKV_BIAS, OUTPUT_BIAS = "blk.0.attn_q.bias", "blk.0.attn_qkv.bias", "blk.0.attn_output.bias"

INTERLEAVED = frozenset({"llama", "granite", "smollm3"})
"""Architectures that llama.cpp rotates by neighbours: its converter interleaved each head's halves."""

_NAMES: Mapping[str, str] = {
    "embedding": EMBEDDING,
    "final_norm": "output_norm.weight",
    "output": OUTPUT,
    "layers.#.attention_norm": "blk.#.attn_norm.weight",
    "layers.#.attention_output_norm": "blk.#.post_attention_norm.weight",
    "layers.#.attention.query": "blk.#.attn_q.weight",
    "layers.#.attention.query.bias": "blk.#.attn_q.bias",
    "layers.#.attention.query_norm": "blk.#.attn_q_norm.weight",
    "layers.#.attention.key": "blk.#.attn_k.weight",
    "layers.#.attention.key.bias": "blk.#.attn_k.bias",
    "layers.#.attention.key_norm": "blk.#.attn_k_norm.weight",
    "layers.#.attention.value": "blk.#.attn_v.weight",
    "layers.#.attention.value.bias": "blk.#.attn_v.bias",
    "layers.#.attention.output": "blk.#.attn_output.weight",
    "layers.#.attention.output.bias": "blk.#.attn_output.bias",
    "layers.#.mlp_norm": "blk.#.ffn_norm.weight",
    "layers.#.mlp_output_norm": "blk.#.post_ffw_norm.weight",
    "layers.#.mlp.gate": "blk.#.ffn_gate.weight",
    "layers.#.mlp.up": "blk.#.ffn_up.weight",
    "layers.#.mlp.down": "blk.#.ffn_down.weight",
    "layers.#.mlp.router": "blk.#.ffn_gate_inp.weight",
}

_PASSED_OVER = r"rope_(freqs|factors_long|factors_short)\.weight|blk\.[0-9]+\.attn_rot_embd\.weight"
"""The factors go into the config; attn_rot_embd is the frequencies themselves, which follow from it."""


def gguf_names(config: ModelConfig, tensors: Collection[str]) -> NameTable:
    """Where the parameters of a model of this config stand in a GGUF file that has these tensors.

    One architecture is written in several ways: queries, keys and values fused or apart, and experts stacked
    or, until 2024, one tensor each.
    """
    names: dict[str, str | Fused | Stacked] = {**_NAMES}
    if "blk.0.attn_qkv.weight" in tensors:
        parts = [f"layers.#.attention.{part}" for part in ("query", "key", "value")]
        names |= dict.fromkeys(parts, Fused("blk.#.attn_qkv.weight", parts))
        biases = [f"{part}.bias" for part in parts]
        names |= dict.fromkeys(biases, Fused("blk.#.attn_qkv.bias", biases))
    if config.architecture == "phi3" and "blk.0.ffn_gate.weight" not in tensors:
        halves = [f"layers.#.mlp.{half}" for half in ("gate", "up")]
        names |= dict.fromkeys(halves, Fused("blk.#.ffn_up.weight", halves))
    stacked = "blk.0.ffn_gate.0.weight" not in tensors
    for matrix in ("gate", "up", "down"):
        names[f"layers.#.mlp.experts.#.{matrix}"] = (
            Stacked(f"blk.#.ffn_{matrix}_exps.weight") if stacked else f"blk.#.ffn_{matrix}.#.weight"
        )
    ropes = [layer.rope for layer in config.layers if layer.rope is not None]
    order = RowOrder(config.head_dim, ropes[0].dim, config.architecture in INTERLEAVED) if ropes else None
    return NameTable(names, passed_over=_PASSED_OVER, order=order)
