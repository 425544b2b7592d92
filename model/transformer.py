"""A Llama-type decoder: embedding, layers, final norm, logits. No batch, no sampling, no files."""

from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import DecoderLayer, Parameters
from model.ops import TorchOps
from model.ops.reference import StepInputs
from model.rotary import rotary_table


class Transformer:
    """The model on one op set; its weights are unset until a loader fills `parameters()`."""

    def __init__(self, config: ModelConfig, ops: TorchOps, max_model_len: int) -> None:
        self.config = config
        self.ops = ops
        self.rotary = rotary_table(config, max_model_len, ops.device)
        self.embedding = ops.weight(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, ops) for _ in range(config.num_layers)]
        self.final_norm = ops.weight(config.hidden_size)
        self.output = self.embedding
        if not config.tie_embeddings:
            self.output = ops.weight(config.vocab_size, config.hidden_size)

    def parameters(self) -> Parameters:
        """Every weight once, by the canonical name that the checkpoint readers use."""
        yield "embedding", self.embedding
        for index, layer in enumerate(self.layers):
            yield from ((f"layers.{index}.{name}", weight) for name, weight in layer.parameters())
        yield "final_norm", self.final_norm
        if not self.config.tie_embeddings:
            yield "output", self.output

    def forward(self, cache: KVCache, inputs: StepInputs) -> Tensor:
        """One pass over a batch: writes the rows' keys and values, gives [rows, hidden]."""
        x = self.ops.embed(inputs, self.embedding)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer.forward(x, self.rotary, layer_cache, inputs)
        return self.ops.rms_norm(x, self.final_norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary] in float32, for the rows that are needed."""
        return self.ops.logits(hidden, self.output)
