"""MiniMind's three generations as plain references, a function each, and tiny random checkpoints.

Written from the facts of the family (docs/minimind.md): a whole sequence at once, without a cache, in the
precision of the tensors; float64 gives the noise floor of float32.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import VOCAB_SIZE
from torch import Tensor
from torch.nn.functional import linear, silu

State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """A model's numbers; the defaults are small."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 96
    """Of the feed-forward network, or of each expert."""
    vocab: int = VOCAB_SIZE
    experts: int = 0
    per_token: int = 2
    shared: int = 0
    theta: float = 1e6
    epsilon: float = 1e-5
    yarn_original: int | None = None
    """Context that YaRN stretches by 16."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# ---- what the generations share


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[tokens, heads, width] each; a key and value head for each group of query heads."""
    tokens, heads, width = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(width)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(tokens, heads * width)


def network(state: State, prefix: str, x: Tensor) -> Tensor:
    """w1 is the gate, w3 is up, w2 is down."""
    names = ("w1", "w3", "w2") if f"{prefix}.w1.weight" in state else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (state[f"{prefix}.{name}.weight"] for name in names)
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def mixture(state: State, prefix: str, x: Tensor, per_token: int, *, scale_one: bool) -> Tensor:
    """The best of a softmax over the experts; scaled to a sum of one if they are several, or in any case."""
    weights, chosen = linear(x, state[f"{prefix}.gate.weight"]).softmax(-1).topk(per_token)  # [tokens, best]
    if per_token > 1 or scale_one:
        weights = weights / weights.sum(-1, keepdim=True)
    rows = []
    for row, best, share in zip(x, chosen.tolist(), weights, strict=True):
        outputs = [network(state, f"{prefix}.experts.{expert}", row) for expert in best]
        rows.append(sum(part * output for part, output in zip(share, outputs, strict=True)))
    return torch.stack(rows)


def frequencies(size: Size) -> Tensor:
    """[head_dim / 2]; computed in float32 and no better, as the model does."""
    half = torch.arange(0, size.head_dim, 2, dtype=torch.float32) / size.head_dim
    turns = 1.0 / size.theta**half
    if size.yarn_original is not None:
        # arXiv:2309.00071: between 32 turns and one within the original context, from kept to divided by 16.
        def pair(rotations: float) -> float:
            return (
                size.head_dim
                * math.log(size.yarn_original / (rotations * 2 * math.pi))
                / (2 * math.log(size.theta))
            )

        low = max(math.floor(pair(32)), 0)
        high = min(math.ceil(pair(1)), size.head_dim // 2 - 1)
        ramp = ((torch.arange(len(turns)) - low) / max(high - low, 0.001)).clamp(0, 1)
        turns = turns * (1 - ramp) + turns / 16 * ramp
    return turns


def angles(size: Size, like: Tensor) -> Tensor:
    """[tokens, head_dim / 2]."""
    positions = torch.arange(len(like), dtype=torch.float32)
    return torch.outer(positions, frequencies(size)).to(like.dtype)


def turn_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) are complex numbers; x is [tokens, heads, width]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def turn_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (i, i + width / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# ---- the generations: state dict and token ids -> logits [tokens, vocabulary]


def v1(state: State, ids: Sequence[int], size: Size) -> Tensor:
    """2024: complex rotary; one shared expert without a number."""
    x = state["tok_embeddings.weight"][torch.tensor(ids)]
    angle = angles(size, x)
    for n in range(size.layers):
        at = f"layers.{n}"
        h = rms_norm(x, state[f"{at}.attention_norm.weight"], size.epsilon)
        q, k, v = (
            linear(h, state[f"{at}.attention.{name}.weight"]).unflatten(-1, (-1, size.head_dim))
            for name in ("wq", "wk", "wv")
        )
        attended = attend(turn_neighbours(q, angle), turn_neighbours(k, angle), v)
        x = x + linear(attended, state[f"{at}.attention.wo.weight"])
        h = rms_norm(x, state[f"{at}.ffn_norm.weight"], size.epsilon)
        if size.experts:
            y = mixture(state, f"{at}.feed_forward", h, size.per_token, scale_one=False)
            x = x + y + network(state, f"{at}.feed_forward.shared_experts", h)
        else:
            x = x + network(state, f"{at}.feed_forward", h)
    return linear(rms_norm(x, state["norm.weight"], size.epsilon), state["output.weight"])


def v2_february(state: State, ids: Sequence[int], size: Size) -> Tensor:
    """2025-02: as v1, with a larger rotary base; its shared experts are a list."""
    if not size.experts:
        return v1(state, ids, size)
    assert size.shared == 1, "the reference knows one"
    return v1(
        {name.replace("shared_experts.0.", "shared_experts."): x for name, x in state.items()}, ids, size
    )


def v2(state: State, ids: Sequence[int], size: Size) -> Tensor:
    """2025-04: transformers' names, and its way of rotating."""
    return _halves(state, ids, size, normed=False)


def v3(state: State, ids: Sequence[int], size: Size) -> Tensor:
    """2026: norms of queries and keys, YaRN, one expert a token whose weight is one, none shared."""
    return _halves(state, ids, size, normed=True)


def _halves(state: State, ids: Sequence[int], size: Size, *, normed: bool) -> Tensor:
    x = state["model.embed_tokens.weight"][torch.tensor(ids)]
    angle = angles(size, x)
    for n in range(size.layers):
        at = f"model.layers.{n}"
        h = rms_norm(x, state[f"{at}.input_layernorm.weight"], size.epsilon)
        q, k, v = (
            linear(h, state[f"{at}.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, size.head_dim))
            for name in "qkv"
        )
        if normed:
            q = rms_norm(q, state[f"{at}.self_attn.q_norm.weight"], size.epsilon)
            k = rms_norm(k, state[f"{at}.self_attn.k_norm.weight"], size.epsilon)
        attended = attend(turn_halves(q, angle), turn_halves(k, angle), v)
        x = x + linear(attended, state[f"{at}.self_attn.o_proj.weight"])
        h = rms_norm(x, state[f"{at}.post_attention_layernorm.weight"], size.epsilon)
        if size.experts:
            y = mixture(state, f"{at}.mlp", h, size.per_token, scale_one=normed)
            for shared in range(size.shared):
                y = y + network(state, f"{at}.mlp.shared_experts.{shared}", h)
            x = x + y
        else:
            x = x + network(state, f"{at}.mlp", h)
    return linear(rms_norm(x, state["model.norm.weight"], size.epsilon), state["lm_head.weight"])


Reference = Callable[[State, Sequence[int], Size], Tensor]


@dataclass(frozen=True)
class Kind:
    """One form of checkpoint."""

    reference: Reference
    size: Size
    config: Mapping[str, object]
    """What its config.json says, beside model_type and what stands in the tensors."""
    fields: Mapping[str, object]
    """What a bare `.pth` of it must be given."""


KINDS = {
    "v1": Kind(
        v1,
        Size(theta=1e4),
        {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "max_seq_len": 512},
        {"num_attention_heads": 4, "rope_theta": 10000},
    ),
    "v1 experts": Kind(
        v1,
        Size(theta=1e4, experts=4, shared=1),
        {"dim": 128, "n_heads": 4, "use_moe": True, "n_routed_experts": 4, "n_shared_experts": True},
        {"num_attention_heads": 4},
    ),
    "v2 of February": Kind(
        v2_february,
        Size(),
        {
            "dim": 128,
            "n_heads": 4,
            "n_kv_heads": 2,
            "max_seq_len": 8192,
            "rope_theta": 1e6,
            "hidden_dim": None,
        },
        {"n_heads": 4, "rope_theta": 1e6},
    ),
    "v2 of February, experts": Kind(
        v2_february,
        Size(experts=4, shared=1),
        {"n_heads": 4, "rope_theta": 1e6, "use_moe": True, "norm_topk_prob": True},
        {"num_attention_heads": 4},
    ),
    "v2": Kind(
        v2,
        Size(kv_heads=1),
        {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": None},
        {"num_attention_heads": 4},
    ),
    "v2 experts": Kind(
        v2,
        Size(experts=5, shared=2),
        {"num_attention_heads": 4, "use_moe": True, "n_routed_experts": 5, "n_shared_experts": 2},
        {"num_attention_heads": 4},
    ),
    "v2, one expert a token": Kind(
        v2,
        Size(experts=4, per_token=1, shared=1),
        {"num_attention_heads": 4, "use_moe": True, "num_experts_per_tok": 1},
        {"num_attention_heads": 4, "num_experts_per_tok": 1},
    ),
    "v3": Kind(
        v3,
        Size(epsilon=1e-6),
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "head_dim": 32,
            "rope_scaling": None,
            "flash_attn": True,
        },
        {},
    ),
    "v3 experts": Kind(
        v3,
        Size(epsilon=1e-6, experts=4, per_token=1),
        {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 96},
        {},
    ),
    "v3, YaRN": Kind(
        v3,
        Size(epsilon=1e-6, yarn_original=2048),
        {
            "inference_rope_scaling": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 2048,
                "attention_factor": 1.0,
            },
        },
        {"inference_rope_scaling": True},
    ),
}


def make_state(kind: Kind, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """A random checkpoint; the tied embedding stands in it twice. Weights are wide, norms are not one."""
    size = kind.size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, norm: bool = False) -> Tensor:
        numbers = torch.randn(*shape, generator=generator)
        return (1 + 0.3 * numbers if norm else 0.2 * numbers).to(dtype)

    old = kind.reference in (v1, v2_february)
    keys = size.kv_heads * size.head_dim
    if old:
        embedding, final, output, layer = "tok_embeddings", "norm", "output", "layers"
        query, key, value, out = (f"attention.{name}" for name in ("wq", "wk", "wv", "wo"))
        first, second, network = "attention_norm", "ffn_norm", "feed_forward"
        gate, up, down = "w1", "w3", "w2"
    else:
        embedding, final, output, layer = "model.embed_tokens", "model.norm", "lm_head", "model.layers"
        query, key, value, out = (f"self_attn.{name}_proj" for name in "qkvo")
        first, second, network = "input_layernorm", "post_attention_layernorm", "mlp"
        gate, up, down = "gate_proj", "up_proj", "down_proj"
    parts: dict[str, Tensor] = {embedding: random(size.vocab, size.hidden)}
    for n in range(size.layers):
        at = f"{layer}.{n}"
        parts[f"{at}.{query}"] = random(size.hidden, size.hidden)
        parts[f"{at}.{key}"] = random(keys, size.hidden)
        parts[f"{at}.{value}"] = random(keys, size.hidden)
        parts[f"{at}.{out}"] = random(size.hidden, size.hidden)
        if kind.reference is v3:
            parts[f"{at}.self_attn.q_norm"] = random(size.head_dim, norm=True)
            parts[f"{at}.self_attn.k_norm"] = random(size.head_dim, norm=True)
        parts[f"{at}.{first}"] = random(size.hidden, norm=True)
        parts[f"{at}.{second}"] = random(size.hidden, norm=True)
        networks = [f"{network}.experts.{e}" for e in range(size.experts)] or [network]
        if size.experts:
            parts[f"{at}.{network}.gate"] = random(size.experts, size.hidden)
        if kind.reference is v1 and size.shared:
            networks.append(f"{network}.shared_experts")
        elif size.shared:
            networks += [f"{network}.shared_experts.{e}" for e in range(size.shared)]
        for name in networks:
            parts[f"{at}.{name}.{gate}"] = random(size.width, size.hidden)
            parts[f"{at}.{name}.{up}"] = random(size.width, size.hidden)
            parts[f"{at}.{name}.{down}"] = random(size.hidden, size.width)
    parts[final] = random(size.hidden, norm=True)
    parts[output] = parts[embedding]
    return {f"{name}.weight": tensor for name, tensor in parts.items()}


def write_config(folder: Path, kind: Kind, **more: object) -> None:
    """A config.json as `save_pretrained` of MiniMind's own class leaves it."""
    code = {"AutoConfig": "model_minimind.MiniMindConfig"}
    config = {"model_type": "minimind", "auto_map": code, "dropout": 0.0, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config | dict(kind.config) | more))
