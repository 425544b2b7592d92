"""The one form in which weights arrive, whatever file they stand in: a config and a stream of named tensors.

Our names, and the parameters of the model: `embedding`, `layers.{i}.attention_norm`,
`layers.{i}.attention.{query,key,value,output}`, `layers.{i}.mlp_norm`, `layers.{i}.mlp.{gate,up,down}`,
`final_norm`, `output` (absent if tied). Linear weights are [out_features, in_features].
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.config import ModelConfig
from model.errors import ModelError
from model.weights.stored import StoredTensor


class Checkpoint(Protocol):
    """A validated weight file or folder: its header is read and checked, its tensors are not yet."""

    @property
    def config(self) -> ModelConfig:
        """What the checkpoint says the model is."""
        ...

    def place(self, name: str) -> str:
        """Say where our `name` stands or ought to: the file, and the tensor by the file's own name for it."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Our name and the shape of each tensor that `tensors` will yield."""
        ...

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield each tensor of the checkpoint exactly once under our name, in the file's order.

        It may be a view of the mapped file: copy it to keep it beyond the file's life. Nothing of it is
        held here once the next one is asked for. Shapes and completeness are the caller's to check.
        Raises ModelError, which names file and tensor, for data that cannot be read.
        """
        ...


def shown(name: str) -> str:
    """Give a foreign name for a message: on one line and short."""
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True, slots=True)
class NameTable:
    """How one format names the tensors of a Llama-type model."""

    top: Mapping[str, str]
    """Foreign to our name, for tensors that stand once."""
    layer: re.Pattern[str]
    """Matches a layer's tensor; its groups are the layer's number and the rest of the name."""
    layer_name: str
    """The same as a format of the two."""
    in_layer: Mapping[str, str]
    """Foreign rest to our rest."""
    passed_over: re.Pattern[str]
    """Tensors that are known and not needed."""

    def all_ours(self, files: Mapping[str, Path], num_layers: int) -> dict[str, str]:
        """Return foreign name to our name without what is passed over; `files` maps each tensor to its file.

        Raises ModelError for a tensor that is unknown or belongs to a layer that the config does not have.
        """
        named = {name: self._ours(name, num_layers, file) for name, file in files.items()}
        return {name: ours for name, ours in named.items() if ours is not None}

    def theirs(self, ours: str) -> str:
        """Return the foreign name of our `ours`."""
        if ours.startswith("layers."):
            _, number, rest = ours.split(".", 2)
            return self.layer_name.format(number, {mine: name for name, mine in self.in_layer.items()}[rest])
        return {mine: name for name, mine in self.top.items()}[ours]

    def _ours(self, name: str, num_layers: int, where: Path) -> str | None:
        if name in self.top:
            return self.top[name]
        if self.passed_over.fullmatch(name):
            return None
        match = self.layer.fullmatch(name)
        if match is None or match[2] not in self.in_layer:
            raise ModelError(
                f"{where}: tensor {shown(name)} is no part of a Llama-type model, and no other is served;"
                " use a plain Llama checkpoint without adapters or biases"
            )
        if int(match[1]) >= num_layers:
            raise ModelError(
                f"{where}: tensor {name} lies beyond the {num_layers} layers of the model's config;"
                " the file and its config do not belong together"
            )
        return f"layers.{match[1]}.{self.in_layer[match[2]]}"
