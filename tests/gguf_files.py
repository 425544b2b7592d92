"""GGUF files of any family for the tests, written as llama.cpp's converter does: `write_gguf`.

Names of tensors and keys are the `gguf` package's own tables. Also a plain quantiser for the K formats, which
the package decodes only.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from checkpoints import _add_field, _interleaved, _llama3_factors
from gguf.quants import quantize
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "gemma3_text": "gemma3",
}
"""By transformers' model_type."""

PERMUTED = ("llama", "granite", "smollm3")
"""Architectures whose converter is a LlamaModel: queries and keys are interleaved."""

Edit = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    kind: str = "F32",
    metadata: Mapping[str, object] | None = None,
    edit: Edit | None = None,
    parts: int = 1,
) -> Path:
    """Write `model` and return the path of the file, or of the first of several parts.

    Matrices are of the given kind where their width is made of whole blocks, else Q8_0 or F32; vectors and
    routers F32. `metadata` is added or wins; None drops a key, and keys without a dot before the first word
    belong to the architecture. `edit` may replace, drop or split a tensor by its name in the file.
    """
    config = model.config.get_text_config()
    arch = ARCHITECTURES[config.model_type]
    fields = {f"{arch}.{key}": value for key, value in _fields(config, arch).items()}
    fields |= {
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        **{key.replace("ARCH.", f"{arch}."): value for key, value in (metadata or {}).items()},
    }
    tensors = [
        (name, tensor)
        for whole_name, whole in _tensors(model, config, arch)
        for name, tensor in (edit(whole_name, whole) if edit else [(whole_name, whole)])
    ]
    if parts > 1:
        path = path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")
    for number in range(parts):
        share = tensors[len(tensors) * number // parts : len(tensors) * (number + 1) // parts]
        file = path.with_name(path.name.replace("-00001-", f"-{number + 1:05}-"))
        writer = gguf.GGUFWriter(file, arch)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        for key, value in fields.items() if number == 0 else ():
            if value is not None:
                _add_field(writer, key, value)
        for name, tensor in share:
            data, stored = encode(np.ascontiguousarray(tensor.detach().float().numpy()), name, kind)
            writer.add_tensor(name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _fields(config: PretrainedConfig, arch: str) -> dict[str, object]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None) or []
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    fields: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    window = getattr(config, "sliding_window", None)
    if window is not None and ("sliding_attention" in types or not types):
        fields["attention.sliding_window"] = window
        if "full_attention" in types:
            fields["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in types]
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        fields |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        if hasattr(config, "moe_intermediate_size"):
            fields["expert_feed_forward_length"] = config.moe_intermediate_size
    if arch == "granite":
        fields |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if arch == "gemma3":
        fields["attention.scale"] = config.query_pre_attn_scalar**-0.5
    return fields | _rope_fields(rope, config)


def _rope_fields(rope: Mapping[str, object], config: PretrainedConfig) -> dict[str, object]:
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": original,
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        }
    if kind == "longrope":
        assert isinstance(original, int)
        scale = config.max_position_embeddings / original
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)),
        }
    assert kind in ("default", "llama3"), kind
    return {}


def _tensors(model: PreTrainedModel, config: PretrainedConfig, arch: str) -> Iterator[tuple[str, Tensor]]:
    by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[arch], config.num_hidden_layers)
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", torch.tensor(_llama3_factors(rope, config.head_dim))
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):  # transformers 5 keeps the halves of all experts in one
            layer = name.split(".")[2]
            gate, up = tensor.chunk(2, dim=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            continue
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        if arch in PERMUTED and "q_proj" in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        if arch in PERMUTED and "k_proj" in name:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield known if known.endswith((".weight", ".bias")) else f"{known}.weight", tensor


def encode(numbers: np.ndarray, name: str, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A tensor's bytes in a format, or in a plainer one that its width allows."""
    stored = gguf.GGMLQuantizationType[kind]
    if numbers.ndim == 1 or "ffn_gate_inp" in name:
        stored = gguf.GGMLQuantizationType.F32
    elif numbers.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        fits = numbers.shape[-1] % 32 == 0
        stored = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
    if stored.name in K_FORMATS:
        return quantise_k(numbers, stored.name), stored
    return quantize(numbers, stored), stored


K_FORMATS = {
    "Q2_K": (16, 2, 4),
    "Q3_K": (16, 3, 6),
    "Q4_K": (32, 4, 6),
    "Q5_K": (32, 5, 6),
    "Q6_K": (16, 6, 8),
}
"""Numbers that share a scale, bits of a number, bits of a scale."""


def quantise_k(numbers: np.ndarray, kind: str) -> np.ndarray:
    """To super-blocks of 256 [..., bytes of a row], by rounding to the range of each group and no search."""
    group, bits, scale_bits = K_FORMATS[kind]
    blocks = numbers.reshape(-1, 256 // group, group)
    count = len(blocks)
    most = 2**bits - 1
    if kind in ("Q3_K", "Q6_K"):
        d, scales = _shared(np.abs(blocks).max(axis=2) / (most // 2), 2 ** (scale_bits - 1) - 1)
        steps, floor = d * scales, np.float32(-(most // 2 + 1))
        quants = blocks / np.where(steps == 0, 1, steps)[:, :, None] - floor
    else:
        lowest = np.minimum(blocks.min(axis=2), 0)
        d, scales = _shared((blocks.max(axis=2) - lowest) / most, 2**scale_bits - 1)
        dmin, mins = _shared(-lowest, 2**scale_bits - 1)
        steps = d * scales
        quants = (blocks + (dmin * mins)[:, :, None]) / np.where(steps == 0, 1, steps)[:, :, None]
    q = np.rint(quants).clip(0, most).astype(np.uint8)
    half = d.astype(np.float16).view(np.uint8)
    match kind:
        case "Q2_K":
            low = _packed(q.reshape(count, 2, 4, 32), 2)
            parts = [scales | mins << 4, low, half, dmin.astype(np.float16).view(np.uint8)]
        case "Q3_K":
            scales = scales + 32
            packed = [_packed((scales & 15).reshape(count, 1, 2, 8), 4)]
            packed += [_packed((scales >> 4).reshape(count, 1, 4, 4), 2)]
            high = _packed((q >> 2).reshape(count, 1, 8, 32), 1)
            parts = [high, _packed((q & 3).reshape(count, 2, 4, 32), 2), *packed, half]
        case "Q6_K":
            high = _packed((q >> 4).reshape(count, 2, 4, 32), 2)
            parts = [_packed((q & 15).reshape(count, 2, 2, 64), 4), high, scales, half]
        case _:
            four = [values[:, :4] | values[:, 4:] >> 4 << 6 for values in (scales, mins)]
            rest = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
            parts = [half, dmin.astype(np.float16).view(np.uint8), *four, rest]
            if kind == "Q5_K":
                parts.append(_packed((q >> 4).reshape(count, 1, 8, 32), 1))
            parts.append(_packed((q & 15).reshape(count, 4, 2, 32), 4))
    return np.concatenate(parts, axis=1).reshape(*numbers.shape[:-1], -1)


def _shared(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """[blocks, groups] as a float16 a block, in float32 [blocks, 1], times bytes up to `most`."""
    unit = (values.max(axis=1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    return unit, np.rint(values / np.where(unit == 0, 1, unit)).clip(0, most).astype(np.uint8)


def _packed(planes: np.ndarray, bits: int) -> np.ndarray:
    """[blocks, many, 8 / bits, bytes] into bytes [blocks, all bytes]: the first plane is the lowest bits."""
    parts = [planes[:, :, index] << bits * index for index in range(8 // bits)]
    return np.bitwise_or.reduce(parts).reshape(len(planes), -1)
