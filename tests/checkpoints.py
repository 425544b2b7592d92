"""Tiny checkpoints for the tests: a random Llama as a transformers folder or a GGUF, and a byte tokenizer.

Ids 0 to 255 of the tokenizer are the bytes themselves; the specials follow.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from model.loader import parameter_shapes
from model.weights.checkpoint import Checkpoint
from model.weights.gguf_parts import read_part
from model.weights.stored import StoredTensor

SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(256, 260)
VOCAB_SIZE = 260
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Chosen so that of head_dim 16 some frequencies are kept, some divided and some blended."""


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """Each parameter of a checkpoint, checked, by our name."""
    expected = parameter_shapes(checkpoint.config)
    checkpoint.check(expected)
    return checkpoint.tensors(expected)


def make_llama(
    folder: Path,
    *,
    tie: bool,
    rope_scaling: bool | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    max_positions: int = 512,
    hidden_act: str = "silu",
    window: int | None = None,
) -> LlamaForCausalLM | MistralForCausalLM:
    """Save a random Llama in transformers' layout to `folder` and return it, in eval mode.

    With a window it is a Mistral, which is the same but for that.

    The weights are wide enough that logits differ clearly, and no norm weight is one. End tokens are EOS and
    IM_END if the vocabulary has them. With `rope_scaling` the rotary frequencies are LLAMA3_SCALING's.
    """
    bytes_and_specials = vocab_size >= VOCAB_SIZE
    kind, make = (LlamaConfig, LlamaForCausalLM) if window is None else (MistralConfig, MistralForCausalLM)
    config = kind(
        **({} if window is None else {"sliding_window": window}),
        hidden_act=hidden_act,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_theta": 10000.0,
            **(LLAMA3_SCALING if rope_scaling else {"rope_type": "default"}),
        },
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=BOS if bytes_and_specials else 1,
        eos_token_id=EOS if bytes_and_specials else 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
                # Not model.to(dtype): that would round the rotary frequencies too, which loading does not.
                parameter.data = parameter.data.to(dtype)
    model.eval()
    if bytes_and_specials:
        model.generation_config.eos_token_id = [EOS, IM_END]
    model.save_pretrained(folder)
    if shards > 1:
        _reshard(folder, model, shards)
    return model


def _reshard(folder: Path, model: LlamaForCausalLM, shards: int) -> None:
    """Write the weights again as exactly so many files with an index, as transformers names them."""
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name].contiguous() for name in list(state)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_gguf(
    model: LlamaForCausalLM,
    path: Path,
    *,
    kind: str = "F32",
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write `model` as convert_hf_to_gguf does and return `path`.

    Matrices are of the given kind (F32, F16, BF16, or one that gguf.quants can quantise to: Q8_0, Q4_0, Q4_1,
    Q5_0, Q5_1; then every width must be a multiple of 32), norms F32. `metadata` is added or wins: str, bool,
    int (uint32), float (float32) and lists; `byte_tokenizer_metadata()` makes the file servable by itself.
    """
    config = model.config
    fields: dict[str, object] = {
        "general.name": "tiny",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        _add_field(writer, key, value)
    for name, tensor in _gguf_tensors(model):
        data = tensor.detach().float().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(name, data)
        else:
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                name, quantize(np.ascontiguousarray(data), quantisation), raw_dtype=quantisation
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")


def _gguf_tensors(model: LlamaForCausalLM) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's names and tensors, in the order of its files."""
    config = model.config
    scaling = config.rope_parameters
    if scaling["rope_type"] == "llama3":
        yield "rope_freqs.weight", torch.tensor(_llama3_factors(scaling, config.head_dim))
    yield "token_embd.weight", model.model.embed_tokens.weight
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.attn_q.weight", _interleaved(attention.q_proj.weight, config.num_attention_heads)
        yield f"blk.{i}.attn_k.weight", _interleaved(attention.k_proj.weight, config.num_key_value_heads)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight
    yield "output_norm.weight", model.model.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of convert_hf_to_gguf: rows of a head's two halves alternate."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(scaling: Mapping[str, float], head_dim: int) -> list[float]:
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf: the divisor of each rotary frequency."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (i / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in of each byte (`bytes_to_unicode` of its encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write tokenizer.json and tokenizer_config.json: a token for each byte, SPECIALS, and a chat template.

    `vocab_size` above VOCAB_SIZE adds unused special tokens, so that it matches the model's.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _specials(vocab_size)])
    assert tokenizer.get_vocab_size() == vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_tokenizer_metadata(vocab_size: int = VOCAB_SIZE) -> dict[str, object]:
    """Return the same tokenizer as GGUF metadata; it has no merges, and an empty list cannot be written."""
    specials = _specials(vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*_byte_symbols(), *specials],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(specials),
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.eot_token_id": IM_END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _specials(vocab_size: int) -> Sequence[str]:
    assert vocab_size >= VOCAB_SIZE
    return [*SPECIALS, *(f"<|extra_{i}|>" for i in range(vocab_size - VOCAB_SIZE))]


def read_metadata(path: Path) -> dict[str, object]:
    """All metadata of a GGUF file, also of one that no model could be made of."""
    return read_part(path).metadata
