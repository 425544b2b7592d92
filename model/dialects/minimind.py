"""A MiniMind checkpoint's config: most of it stands in the tensors' names and shapes.

What they leave open (heads, rotary base, epsilon, context, routing) the fields of config.json or of a flag
say; else it is the default of the generation, if all generations that the tensors fit have the same one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos
from types import MappingProxyType

from model.config import ExpertsConfig, LayerConfig, ModelConfig
from model.dialects.fields import (
    MOST_EXPERTS,
    MOST_FREQUENCY_BASE,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_VOCABULARY,
    MOST_WIDTH,
    Fields,
)
from model.dialects.hf_rope import read_rope
from model.dialects.minimind_generations import GENERATIONS, PASSED_OVER, ROTATIONS, Generation
from model.errors import ModelError
from model.rope import Rope
from model.weights.names import NameTable
from model.weights.row_order import RowOrder

_OLD_WORDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "intermediate_size": "hidden_dim",
    "num_experts": "n_routed_experts",
}
"""Fields by today's name -> by an older one."""

_EXPERT_FIELDS = ("num_experts_per_tok", "norm_topk_prob", "n_shared_experts", "moe_intermediate_size")

FIELDS = (
    *_OLD_WORDS,
    *_OLD_WORDS.values(),
    *_EXPERT_FIELDS,
    "vocab_size",
    "head_dim",
    "rope_theta",
    "tie_word_embeddings",
    "use_moe",
    "inference_rope_scaling",
    "bos_token_id",
    "eos_token_id",
)
"""What has an effect, or is held against the tensors."""

_NEUTRAL: Mapping[str, object] = {
    "hidden_act": "silu",
    "scoring_func": "softmax",
    "quantization_config": None,
}

_POSITIONS, _SCALED, _ORIGINAL = (
    "max_position_embeddings",
    "inference_rope_scaling",
    "original_max_position_embeddings",
)
_YARN: Mapping[str, object] = {
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
    _ORIGINAL: 2048,
}
"""What v3's code has for `inference_rope_scaling`."""

_COSINE_ERROR = 2e-3
"""Of rotations that were saved in half precision."""


def todays_words(given: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Fields under the names that v3 has for them; ModelError if two names of one field disagree.

    A whole config.json of v1 has no rotary base, which only its code has.
    """
    old = {older: name for name, older in _OLD_WORDS.items()}
    fields: dict[str, object] = {}
    for name, value in given.items():
        today = old.get(name, name)
        if value is None:
            continue
        if fields.setdefault(today, value) != value:
            raise ModelError(
                f"{where}: {today} and {_OLD_WORDS[today]} are one field and disagree; leave one out"
            )
    if given.get("model_type") == "minimind" and "max_seq_len" in given:
        fields.setdefault("rope_theta", GENERATIONS[0].theta)
    return fields


def from_minimind(
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, object],
    where: tuple[str, str],
    *,
    dtype: str = "float32",
    cosines: Sequence[float] = (),
) -> tuple[ModelConfig, NameTable]:
    """The config of a MiniMind checkpoint, and where its parameters stand.

    Args:
        shapes: of its tensors, by their own names.
        given: the fields of config.json and flags, by `todays_words`.
        where: what messages call the weights, and the fields.
        dtype: the embedding's.
        cosines: of each frequency's rotation by one position, if the checkpoint has a table of them.

    Raises ModelError for what is not MiniMind's, contradicts itself, or is neither in the tensors nor given.

    """
    weights, fields_of = where
    fitting = tuple(generation for generation in GENERATIONS if generation.fits(shapes))
    if not fitting:
        tensors = " or ".join(dict.fromkeys(g.tensor("layers.0.attention.query") for g in GENERATIONS))
        raise ModelError(f"{weights}: is no MiniMind checkpoint, it has no tensor {tensors}; give such a one")
    reading = _Reading(shapes, Fields(given, fields_of), weights, fitting, cosines)
    config = reading.config(dtype)
    order = RowOrder(config.head_dim, config.head_dim, interleaved=fitting[0].old)
    return config, NameTable(fitting[0].names, passed_over=PASSED_OVER, order=order)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The tensors and the fields of one checkpoint, held against each other."""

    shapes: Mapping[str, tuple[int, ...]]
    fields: Fields
    weights: str
    fitting: Sequence[Generation]
    """Whose tensors have such names; they differ in what fields say, and in the form of shared experts."""
    cosines: Sequence[float]

    def config(self, dtype: str) -> ModelConfig:
        """All of it (ModelError)."""
        fields = self.fields
        fields.neutral(_NEUTRAL)
        embedding = "embedding" if self._name("embedding") in self.shapes else "output"
        vocab_size, hidden_size = self._matrix(embedding)
        self._agree("vocab_size", vocab_size, MOST_VOCABULARY)
        self._agree("hidden_size", hidden_size, MOST_WIDTH)
        num_layers = self._count("layers.{}.attention_norm")
        self._agree("num_hidden_layers", num_layers, MOST_LAYERS)
        num_heads, num_kv_heads, head_dim = self._heads()
        rope, positions = self._rope(head_dim)
        experts = self._experts()
        if experts is None:
            width = self._matrix("layers.0.mlp.gate")[0]
            self._agree("intermediate_size", width, MOST_WIDTH)
        return ModelConfig(
            architecture="minimind",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            layers=(LayerConfig(rope, experts=experts is not None),) * num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=width if experts is None else experts.intermediate_size,
            hidden_act="silu",
            norm_eps=fields.number("rms_norm_eps", 1e-20, 0.1, self.fitting[0].epsilon),
            max_position_embeddings=positions,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            dtype=dtype,
            bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
            eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
            query_key_norm="head" if self.fitting[0].normed else None,
            experts=experts,
        )

    def _heads(self) -> tuple[int, int, int]:
        """Heads, key-value heads and head width."""
        (query, _), (key, _) = (
            self._matrix("layers.0.attention.query"),
            self._matrix("layers.0.attention.key"),
        )
        head_dim = self._head_dim(query)
        if query % head_dim or key % head_dim or query % key or head_dim % 2:
            raise ModelError(
                f"{self.weights}: {query} rows of queries and {key} of keys are no groups of heads of"
                f" {head_dim}, an even number; check num_attention_heads"
            )
        self._agree("head_dim", head_dim, MOST_HEADS)
        self._agree("num_attention_heads", query // head_dim, MOST_HEADS)
        self._agree("num_key_value_heads", key // head_dim, MOST_HEADS)
        return query // head_dim, key // head_dim, head_dim

    def _head_dim(self, query: int) -> int:
        """From the norm of a head's queries, from a table of rotations, or from the fields."""
        if self.fitting[0].normed:
            return self._shape("layers.0.attention.query_norm", 1)[0]
        for table, numbers in ROTATIONS.items():
            if len(self.shapes.get(table, ())) == 2:
                return self.shapes[table][1] * numbers
        if self.fields.get("num_attention_heads") is not None:
            heads = self.fields.count("num_attention_heads", MOST_HEADS)
            if query % heads:
                raise self.fields.refusal("num_attention_heads", f"a divisor of {query}, its rows of queries")
            return query // heads
        if self.fields.get("head_dim") is not None:
            return self.fields.count("head_dim", MOST_HEADS)
        raise self._unsaid("num_attention_heads", "how many attention heads it has")

    def _rope(self, head_dim: int) -> tuple[Rope, int]:
        """How it rotates, and the longest context."""
        name = "rope_parameters" if self.fields.get("rope_parameters") is not None else "rope_scaling"
        given = self.fields.get(name) or {}
        if not isinstance(given, Mapping):
            raise self.fields.refusal(name, "an object or null")
        scaled = Fields(given, f"{self.fields.where} ({name})")
        theta = self._theta(self.fields if scaled.get("rope_theta") is None else scaled, head_dim)
        # A base that is one generation's own tells which one it is.
        generations = [g for g in self.fitting if g.theta == theta] or self.fitting
        positions = self._positions(generations)
        kind = "type" if scaled.get("rope_type") is None else "rope_type"
        values: dict[str, object] = {"rope_theta": theta, "max_position_embeddings": positions}
        if scaled.word(kind, ("default", "yarn"), "default") == "yarn" or self.fields.flag(_SCALED, False):
            if not generations[0].normed:
                raise ModelError(
                    f"{self.fields.where}: scales rotations, which is served for MiniMind v3 only;"
                    f" set {_SCALED} to false, and rope_scaling to null"
                )
            yarn = {**_YARN, **given, kind: "yarn"}
            if positions > Fields(yarn, scaled.where).count(_ORIGINAL, MOST_POSITIONS):  # as in its code
                values[name] = yarn
        return read_rope(Fields(values, self.fields.where), head_dim), positions

    def _positions(self, generations: Sequence[Generation]) -> int:
        """The longest context, as the fields or a table say; else as it is in all these."""
        tables = (*ROTATIONS, "layers.0.attention.mask")  # [1, 1, positions, positions]
        seen = next((self.shapes[table][-2] for table in tables if len(self.shapes.get(table, ())) > 1), None)
        longest = {g.name: g.positions for g in generations}
        if self.fields.get(_POSITIONS) is None and seen is None and len(set(longest.values())) > 1:
            raise self._unsaid(_POSITIONS, "how long its contexts are", longest)
        return self.fields.count(_POSITIONS, MOST_POSITIONS, seen or generations[0].positions)

    def _theta(self, fields: Fields, head_dim: int) -> float:
        """The rotary base, as the fields or a table of rotations say; else as it is in all that fit."""
        if fields.get("rope_theta") is not None:
            theta = fields.number("rope_theta", 1, MOST_FREQUENCY_BASE)
            if not self._turns_by(theta, head_dim):
                raise fields.refusal("rope_theta", "that of the table of rotations among the tensors")
            return theta
        thetas = {g.name: g.theta for g in self.fitting if self._turns_by(g.theta, head_dim)}
        if len(set(thetas.values())) != 1:
            raise self._unsaid("rope_theta", "its rotary base", thetas)
        return next(iter(thetas.values()))

    def _turns_by(self, theta: float, head_dim: int) -> bool:
        """Whether the checkpoint's table of rotations, if it has one, is of this base."""
        angles = (theta ** (-2 * pair / head_dim) for pair in range(len(self.cosines)))
        return all(
            abs(cos(angle) - seen) < _COSINE_ERROR for angle, seen in zip(angles, self.cosines, strict=True)
        )

    def _experts(self) -> ExpertsConfig | None:
        count = self._count("layers.0.mlp.experts.{}.gate")
        self._agree("use_moe", count > 0)
        if count == 0:
            return None
        self._agree("num_experts", count, MOST_EXPERTS)
        num_shared = 0
        if "layers.#.mlp.shared.#.gate" in self.fitting[0].names:
            listed = self._name("layers.0.mlp.shared.0.gate") != self._name("layers.0.mlp.shared.1.gate")
            most = MOST_EXPERTS if listed else 1
            num_shared = self._count("layers.0.mlp.shared.{}.gate", most)
            self._agree("n_shared_experts", num_shared)
        width = self._matrix("layers.0.mlp.experts.0.gate")[0]
        self._agree(
            "moe_intermediate_size" if self.fitting[0].normed else "intermediate_size", width, MOST_WIDTH
        )
        per_token = self.fields.count("num_experts_per_tok", count, min(count, self.fitting[0].per_token))
        return ExpertsConfig(
            count=count,
            per_token=per_token,
            intermediate_size=width,
            normalised=self.fields.flag("norm_topk_prob", True) and (per_token > 1 or self.fitting[0].normed),
            num_shared=num_shared,
            shared_intermediate_size=self._matrix("layers.0.mlp.shared.0.gate")[0] if num_shared else 0,
        )

    def _name(self, ours: str) -> str:
        return self.fitting[0].tensor(ours)

    def _shape(self, ours: str, dimensions: int) -> tuple[int, ...]:
        """The shape of the tensor that is our parameter, none of it zero."""
        name = self._name(ours)
        shape = self.shapes.get(name)
        if shape is None:
            raise ModelError(f"{self.weights}: the tensor {name} is missing; save the whole model again")
        if len(shape) != dimensions or 0 in shape:
            raise ModelError(
                f"{self.weights}: the tensor {name} has shape {list(shape)}, but ought to have {dimensions}"
                " dimensions; save the model again"
            )
        return shape

    def _matrix(self, ours: str) -> tuple[int, int]:
        rows, columns = self._shape(ours, 2)
        return rows, columns

    def _count(self, ours: str, most: int = MOST_LAYERS) -> int:
        """How many of our parameters of such a name there are, from 0 on without a gap; `most` at most."""
        return next(
            (index for index in range(most) if self._name(ours.format(index)) not in self.shapes), most
        )

    def _agree(self, field: str, found: int, most: int | None = None) -> None:
        """Refuse a field that is given and not what the tensors say, and what no model has."""
        value = self.fields.get(field)
        if value is not None and value != found:
            raise self.fields.refusal(
                field, f"{str(found).lower()}, as the tensors of {self.weights} have it"
            )
        if most is not None and not 1 <= found <= most:
            raise ModelError(f"{self.weights}: its tensors make {field} {found}, and {most} is the most")

    def _unsaid(
        self, field: str, what: str, values: Mapping[str, float] = MappingProxyType({})
    ) -> ModelError:
        """For what is neither in the tensors nor given, and not the same in all generations that fit."""
        shown = ", ".join(f"{value:g} in {name}" for name, value in values.items())
        return ModelError(
            f"{self.weights}: its tensors do not say {what}{f' ({shown})' if shown else ''};"
            f" give --config-fields {field}=..., or put its config.json beside it"
        )
