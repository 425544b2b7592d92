"""MiniMind's three generations: the names of their tensors, and what their code has where files say nothing.

Source: jingyaogong/minimind, model/LMConfig.py, model/model.py and model/model_minimind.py through the years.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from model.weights.names import NameTable

PASSED_OVER = r"((model|layers\.[0-9]+\.attention)\.)?(mask|pos_cis|freqs_cos|freqs_sin)"
"""Tables that follow from the config: what a position sees, and how it is rotated."""

ROTATIONS = {"pos_cis": 2, "freqs_cos": 1, "model.freqs_cos": 1}
"""Tables [positions, columns] of rotations, or of their cosines -> numbers of a head for a column."""

_QUERY_NORM = "model.layers.0.self_attn.q_norm.weight"
_SHARED = "layers.#.mlp.shared.#.gate"


def _table(
    top: Sequence[str], layer: str, parts: Mapping[str, str], network: Sequence[str], shared: str | None
) -> Mapping[str, str]:
    """Our names -> theirs, `#` for each number."""
    names = dict(zip(("embedding", "final_norm", "output"), top, strict=True))
    names |= {f"layers.#.{ours}": f"{layer}.{theirs}.weight" for ours, theirs in parts.items()}
    folder, *matrices = network
    names["layers.#.mlp.router"] = f"{layer}.{folder}.gate.weight"
    for ours, theirs in zip(("gate", "up", "down"), matrices, strict=True):
        names[f"layers.#.mlp.{ours}"] = f"{layer}.{folder}.{theirs}.weight"
        names[f"layers.#.mlp.experts.#.{ours}"] = f"{layer}.{folder}.experts.#.{theirs}.weight"
        if shared is not None:
            names[f"layers.#.mlp.shared.#.{ours}"] = f"{layer}.{folder}.{shared}.{theirs}.weight"
    return names


def _old_names(shared: str) -> Mapping[str, str]:
    """Of v1, and of v2 before 2025-04."""
    parts = {
        "attention_norm": "attention_norm",
        "mlp_norm": "ffn_norm",
        "attention.query": "attention.wq",
        "attention.key": "attention.wk",
        "attention.value": "attention.wv",
        "attention.output": "attention.wo",
    }
    top = ("tok_embeddings.weight", "norm.weight", "output.weight")
    return _table(top, "layers.#", parts, ("feed_forward", "w1", "w3", "w2"), shared)


def _new_names(shared: str | None) -> Mapping[str, str]:
    """Of v2 from 2025-04 on, and of v3: as in transformers."""
    parts = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    top = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    network = ("mlp", "gate_proj", "up_proj", "down_proj")
    return _table(top, "model.layers.#", parts, network, shared)


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generation's code has and its files may leave unsaid."""

    name: str
    names: Mapping[str, str]
    theta: float
    epsilon: float
    positions: int
    per_token: int
    """Experts of a token."""
    old: bool = False
    """Whether it rotates neighbours, as complex numbers."""
    normed: bool = False
    """Whether queries and keys have norms; then also a single expert's weight is scaled to one."""

    def tensor(self, ours: str) -> str:
        """The name of the tensor that is our parameter."""
        return NameTable(self.names).place(ours).tensor

    def fits(self, tensors: Collection[str]) -> bool:
        """Whether tensors of these names may be this generation's."""
        if self.tensor("layers.0.attention.query") not in tensors or (_QUERY_NORM in tensors) != self.normed:
            return False
        if not any(".shared_experts." in name for name in tensors):
            return True
        return _SHARED in self.names and self.tensor("layers.0.mlp.shared.0.gate") in tensors


GENERATIONS = (
    Generation("v1", _old_names("shared_experts"), 1e4, 1e-5, 512, 2, old=True),
    Generation("v2 of 2025-02", _old_names("shared_experts.#"), 1e6, 1e-5, 8192, 2, old=True),
    Generation("v2", _new_names("shared_experts.#"), 1e6, 1e-5, 32768, 2),
    Generation("v3", _new_names(None), 1e6, 1e-6, 32768, 1, normed=True),
)
