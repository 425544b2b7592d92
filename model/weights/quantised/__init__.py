"""Checkpoints that were quantised by a training framework, as config.json's `quantization_config` says.

Each format is a file here. Which modules are quantised, and which are not, is what their tensors say.
"""

from collections.abc import Callable, Mapping

from model.dialects.fields import Fields
from model.weights.quantised.awq import from_awq
from model.weights.quantised.compressed import from_compressed
from model.weights.quantised.fp8 import from_fp8
from model.weights.quantised.gptq import from_gptq
from model.weights.quantised.pieces import Format

_METHODS: Mapping[str, Callable[[Fields], Format]] = {
    "awq": from_awq,
    "compressed-tensors": from_compressed,
    "fp8": from_fp8,
    "gptq": from_gptq,
}


def quantisation(fields: Fields) -> Format:
    """The format that a `quantization_config` describes; ModelError for one that is not served."""
    return _METHODS[fields.word("quant_method", tuple(_METHODS))](fields)
