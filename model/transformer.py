"""A Llama-type decoder: embedding, layers, final norm, logits. No batch, no sampling, no files."""

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import DecoderLayer, Parameters
from model.ops.base import Activations, Inputs, Ops
from model.rotary import rotary_table


class Transformer:
    """The model on one op set; its weights are unset until a loader fills `parameters()`."""

    def __init__(self, config: ModelConfig, ops: Ops, max_model_len: int) -> None:
        self.config = config
        self.ops = ops
        self.rotary = rotary_table(config, max_model_len, ops.device)
        self.embedding = ops.matrix(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, ops) for _ in range(config.num_layers)]
        self.final_norm = ops.vector(config.hidden_size)
        self.output = self.embedding
        if not config.tie_embeddings:
            self.output = ops.matrix(config.vocab_size, config.hidden_size)

    def parameters(self) -> Parameters:
        """Every weight once, by the canonical name that the checkpoint readers use."""
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{name}", weight) for name, weight in layer.parameters())
        yield "final_norm", self.final_norm
        if not self.config.tie_embeddings:
            yield "output", self.output

    def forward(self, cache: KVCache, inputs: Inputs) -> Activations:
        """One pass over a batch: writes the rows' keys and values, gives [rows, hidden]."""
        x = self.ops.embed(inputs, self.embedding)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.forward(x, self.rotary, layer_cache, inputs)
        return x

    def logits(self, hidden: Activations, rows: Inputs) -> Activations:
        """[rows, hidden] -> [selected rows, vocabulary] in float32, for the rows that are needed."""
        selected = self.ops.select(hidden, rows)
        normed = self.ops.rms_norm(selected, self.final_norm, self.config.norm_eps)
        return self.ops.logits(normed, self.output)
