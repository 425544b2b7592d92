"""The parts of a decoder layer, as the papers have them, written against the op set alone.

What flows between ops is the op set's own; a layer only names weights and the order of operations.
A part allocates its weights and offers them by name, fused ones in slices, for the loader to fill.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from model.config import LayerConfig, ModelConfig
from model.kv_cache import LayerCache
from model.ops.base import Activations, Adapters, Inputs, Ops, QueryKeyNorm, Weight

Parameters = Iterator[tuple[str, Weight]]


class Linear:
    """A matrix, or several that read the same rows, side by side; with a bias or without."""

    def __init__(self, ops: Ops, inputs: int, outputs: Mapping[str, int], *, bias: bool = False) -> None:
        self.ops = ops
        self.outputs = dict(outputs)
        """Size of each part by its name, in order."""
        size = sum(outputs.values())
        self.weight = ops.matrix(size, inputs)
        self.bias = ops.vector(size) if bias else None
        self.adapters: Adapters | None = None
        """What changes the product, for the rows that ask for it (lora.py)."""

    def parameters(self) -> Parameters:
        """Each part by its name, and its bias beside it."""
        sizes = tuple(self.outputs.values())
        yield from zip(self.outputs, self.ops.split(self.weight, sizes), strict=True)
        if self.bias is not None:
            biases = self.ops.split(self.bias, sizes)
            yield from ((f"{name}.bias", part) for name, part in zip(self.outputs, biases, strict=True))

    def forward(self, x: Activations, inputs: Inputs) -> Activations:
        """[rows, in] -> [rows, all outputs]."""
        y = self.ops.linear(x, self.weight, self.bias)
        return y if self.adapters is None else self.ops.low_rank(y, x, self.adapters, inputs)


class Attention:
    """Grouped-query attention (arXiv:2305.13245) with rotary positions over a paged cache."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, ops: Ops) -> None:
        self.ops = ops
        self.num_heads = config.num_heads
        self.scale = config.query_scale
        self.window = layer.window
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            ops, config.hidden_size, {"query": query, "key": key, "value": key}, bias=config.qkv_bias
        )
        self.output = Linear(ops, query, {"output": config.hidden_size}, bias=config.output_bias)
        self.norm: QueryKeyNorm | None = None
        if config.query_key_norm is not None:
            sizes = (query, key) if config.query_key_norm == "width" else (config.head_dim, config.head_dim)
            self.norm = QueryKeyNorm(ops.vector(sizes[0]), ops.vector(sizes[1]), config.norm_eps)

    def parameters(self) -> Parameters:
        """Weights by name."""
        for linear in self.linears():
            yield from linear.parameters()
        if self.norm is not None:
            yield from (("query_norm", self.norm.query), ("key_norm", self.norm.key))

    def linears(self) -> Iterator[Linear]:
        """What adapters may change."""
        yield from (self.qkv, self.output)

    def project(
        self, x: Activations, rotary: Tensor | None, cache: LayerCache, inputs: Inputs
    ) -> Activations:
        """[rows, hidden] -> queries; writes the rows' keys and values into the cache."""
        qkv = self.qkv.forward(x, inputs)
        return self.ops.rotate_and_store(
            qkv, rotary, cache, inputs, self.num_heads, self.scale, norm=self.norm
        )

    def attend(self, query: Activations, cache: LayerCache, inputs: Inputs) -> Activations:
        """Queries -> [rows, hidden]."""
        return self.output.forward(self.ops.attention(query, cache, inputs, self.window), inputs)


class MLP:
    """The gated feed-forward network (arXiv:2002.05202): SwiGLU, or GEGLU."""

    def __init__(self, config: ModelConfig, ops: Ops, size: int) -> None:
        self.ops = ops
        self.activation = config.hidden_act
        self.gate_up = Linear(ops, config.hidden_size, {"gate": size, "up": size})
        self.down = Linear(ops, size, {"down": config.hidden_size})

    def parameters(self) -> Parameters:
        """Weights by name; gate and up are halves of one matrix."""
        for linear in self.linears():
            yield from linear.parameters()

    def linears(self) -> Iterator[Linear]:
        """What adapters may change."""
        yield from (self.gate_up, self.down)

    def forward(self, x: Activations, inputs: Inputs) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        gated = self.ops.gated(self.gate_up.forward(x, inputs), self.activation)
        return self.down.forward(gated, inputs)


class MixtureOfExperts:
    """Each row's few best feed-forward networks (arXiv:2101.03961), and those that every row takes."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        assert config.experts is not None
        self.ops = ops
        self.config = config.experts
        self.activation = config.hidden_act
        self.router = ops.router(self.config.count, config.hidden_size)
        size = self.config.intermediate_size
        self.experts = [MLP(config, ops, size) for _ in range(self.config.count)]
        size = self.config.shared_intermediate_size
        self.shared = [MLP(config, ops, size) for _ in range(self.config.num_shared)]

    def parameters(self) -> Parameters:
        """Weights by name."""
        yield "router", self.router
        for kind, networks in (("experts", self.experts), ("shared", self.shared)):
            for index, network in enumerate(networks):
                yield from ((f"{kind}.{index}.{name}", weight) for name, weight in network.parameters())

    def linears(self) -> Iterator[Linear]:
        """What adapters may change: nothing."""
        yield from ()

    def forward(self, x: Activations, inputs: Inputs) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        gate_ups = [expert.gate_up.weight for expert in self.experts]
        downs = [expert.down.weight for expert in self.experts]
        y = self.ops.experts(x, self.router, gate_ups, downs, self.config, self.activation)
        for network in self.shared:
            y = self.ops.add(y, network.forward(x, inputs))
        return y


class DecoderLayer:
    """Attention and feed-forward network, each with a norm before it and added to the residual stream."""

    norms: tuple[str, ...] = ("attention_norm", "mlp_norm")

    def __init__(self, config: ModelConfig, layer: LayerConfig, ops: Ops, *, is_last: bool) -> None:
        self.ops = ops
        self.is_last = is_last
        self.rope = layer.rope
        self.epsilon = config.norm_eps
        self.multiplier = config.residual_multiplier
        self.attention = Attention(config, layer, ops)
        self.mlp: MLP | MixtureOfExperts
        self.mlp = (
            MixtureOfExperts(config, ops) if layer.experts else MLP(config, ops, config.intermediate_size)
        )
        self.norm = {name: ops.vector(config.hidden_size) for name in self.norms}

    def parameters(self) -> Parameters:
        """Weights by name."""
        yield from self.norm.items()
        yield from ((f"attention.{name}", weight) for name, weight in self.attention.parameters())
        yield from ((f"mlp.{name}", weight) for name, weight in self.mlp.parameters())

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """What adapters may change, by the name that its parts' names follow."""
        yield from (("attention", linear) for linear in self.attention.linears())
        yield from (("mlp", linear) for linear in self.mlp.linears())

    def forward(
        self, x: Activations, rotary: Tensor | None, cache: LayerCache, inputs: Inputs
    ) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        x, attended = self._attended(x, self._normed(x, "attention_norm"), rotary, cache, inputs)
        x = self.ops.add(x, attended, self.multiplier)
        return self.ops.add(x, self.mlp.forward(self._normed(x, "mlp_norm"), inputs), self.multiplier)

    def _normed(self, x: Activations, name: str) -> Activations:
        return self.ops.rms_norm(x, self.norm[name], self.epsilon)

    def _attended(
        self,
        x: Activations,
        given: Activations,
        rotary: Tensor | None,
        cache: LayerCache,
        inputs: Inputs,
    ) -> tuple[Activations, Activations]:
        """The residual stream, and what attention makes of what it is given; both of the rows that go on."""
        query = self.attention.project(given, rotary, cache, inputs)
        if self.is_last:  # nobody reads what others become of here on
            x, query = self.ops.narrow(x, query)
        return x, self.attention.attend(query, cache, inputs)


class PostNormLayer(DecoderLayer):
    """The norms come after attention and MLP, before the addition (OLMo 2, arXiv:2501.00656)."""

    norms = ("attention_output_norm", "mlp_output_norm")

    def forward(
        self, x: Activations, rotary: Tensor | None, cache: LayerCache, inputs: Inputs
    ) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        x, attended = self._attended(x, x, rotary, cache, inputs)
        x = self.ops.add(x, self._normed(attended, "attention_output_norm"), self.multiplier)
        return self.ops.add(x, self._normed(self.mlp.forward(x, inputs), "mlp_output_norm"), self.multiplier)


class SandwichLayer(DecoderLayer):
    """Norms before and after both (Gemma 3, arXiv:2503.19786)."""

    norms = ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")

    def forward(
        self, x: Activations, rotary: Tensor | None, cache: LayerCache, inputs: Inputs
    ) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        x, attended = self._attended(x, self._normed(x, "attention_norm"), rotary, cache, inputs)
        x = self.ops.add(x, self._normed(attended, "attention_output_norm"), self.multiplier)
        fed = self.mlp.forward(self._normed(x, "mlp_norm"), inputs)
        return self.ops.add(x, self._normed(fed, "mlp_output_norm"), self.multiplier)


LAYERS = {"pre_norm": DecoderLayer, "post_norm": PostNormLayer, "sandwich": SandwichLayer}
"""By ModelConfig.block."""
