"""A decoder: embedding, layers, final norm, logits. No batch, no sampling, no files."""

from collections.abc import Iterator

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import LAYERS, Linear, Parameters
from model.ops.base import Activations, Inputs, Ops
from model.rotary import rotary_table


class Transformer:
    """The model on one op set; its weights are unset until a loader fills `parameters()`."""

    def __init__(self, config: ModelConfig, ops: Ops, max_model_len: int) -> None:
        self.config = config
        self.ops = ops
        self.rotary = {
            rope: rotary_table(rope, config.head_dim, max_model_len, ops.device)
            for rope in dict.fromkeys(layer.rope for layer in config.layers)
            if rope is not None
        }
        self.embedding = ops.matrix(config.vocab_size, config.hidden_size)
        make_layer = LAYERS[config.block]
        last = len(config.layers) - 1
        self.layers = [
            make_layer(config, layer, ops, is_last=index == last) for index, layer in enumerate(config.layers)
        ]
        self.final_norm = ops.vector(config.hidden_size)
        self.output = self.embedding
        if not config.tie_embeddings:
            self.output = ops.matrix(config.vocab_size, config.hidden_size)

    def parameters(self) -> Parameters:
        """Every weight once, by the canonical name (weights/names.py)."""
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{name}", weight) for name, weight in layer.parameters())
        yield "final_norm", self.final_norm
        if not self.config.tie_embeddings:
            yield "output", self.output

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """What adapters may change, by the name that its parts' names follow."""
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{name}", linear) for name, linear in layer.linears())

    def forward(self, cache: KVCache, inputs: Inputs) -> Activations:
        """One pass over a batch: writes the rows' keys and values, gives [rows that go on, hidden]."""
        x = self.ops.embed(inputs, self.embedding, self.config.embedding_multiplier)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            rotary = None if layer.rope is None else self.rotary[layer.rope]
            x = layer.forward(x, rotary, layer_cache, inputs)
        return x

    def logits(self, hidden: Activations, rows: Inputs) -> Activations:
        """[rows, hidden] -> [selected rows, vocabulary] in float32, for the rows that are needed."""
        selected = self.ops.select(hidden, rows)
        normed = self.ops.rms_norm(selected, self.final_norm, self.config.norm_eps)
        return self.ops.logits(normed, self.output, self.config.logits_multiplier)
