"""A checkpoint: a config, the tensors of its files, and the table that says which is which parameter.

It is strict: every tensor of the files is a parameter (or known and not needed), every parameter has its
tensor, and shapes agree, or `check` fails by name before anything is allocated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.weights.names import NameTable, Place
from model.weights.stored import StoredTensor

_COMPARED_AT_ONCE = 1 << 20


def shown(name: str) -> str:
    """Give a foreign name for a message: on one line and short."""
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


class TensorFiles(Protocol):
    """The tensors of one file or of several, by their own names; headers are checked, data are not read."""

    path: Path
    """The file or the folder that the user gave."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor, in the files' order."""

    def file_of(self, name: str) -> Path:
        """The file that a tensor stands in; where it is missing, the file or folder that ought to have it."""

    def read(self, name: str) -> StoredTensor:
        """One tensor; it may be a view of the mapped file (ModelError, which names file and tensor)."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What can be loaded: headers are read and checked, tensors are not yet."""

    config: ModelConfig
    files: TensorFiles
    names: NameTable

    @property
    def path(self) -> Path:
        """The file or the folder that the user gave."""
        return self.files.path

    def describe(self, name: str) -> str:
        """Where our parameter `name` stands or ought to: the file, and the tensor by the file's own name."""
        return self._describe(self._place(name).tensor)

    def whole(self, name: str) -> StoredTensor:
        """The foreign tensor that our parameter `name` is, or is a part of."""
        return self.files.read(self._place(name).tensor)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Hold the files against the model's parameters and their shapes (ModelError)."""
        shapes = self.files.shapes
        missing = []
        known: dict[str, tuple[int, ...]] = {}
        for ours, shape in expected.items():
            place = self._place(ours)
            known[place.tensor] = self._whole(place, shape, expected, known.get(place.tensor))
            if place.tensor not in shapes:
                missing.append(place.tensor)
        for tensor, found in shapes.items():
            if self.names.is_passed_over(tensor) or self._repeats_embedding(tensor):
                continue
            if tensor not in known:
                if self._adds_nothing(tensor, known):
                    continue
                model = f"{self.config.architecture} of {self.config.num_layers} layers"
                raise ModelError(
                    f"{self._describe(tensor)} has no place in a {model}; check that config and weights"
                    " belong together, and leave adapters out"
                )
            if found != known[tensor]:
                raise ModelError(
                    f"{self._describe(tensor)} has shape {list(found)}, "
                    f"but its config says {list(known[tensor])}"
                )
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"{self._describe(missing[0])} is missing{more}; download the checkpoint again")

    def tensors(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, StoredTensor]]:
        """Yield each parameter that is `expected`, in the files' order; `check` must have passed.

        It may be a view of the mapped file: copy it to keep it beyond the file's life. Nothing of it is
        held here once the next one is asked for. ModelError, which names file and tensor, for data that
        cannot be read.
        """
        wanted: dict[str, list[tuple[str, Place]]] = {}
        for ours in expected:
            place = self._place(ours)
            wanted.setdefault(place.tensor, []).append((ours, place))
        for tensor in self.files.shapes:
            if tensor not in wanted:
                if self._repeats_embedding(tensor):
                    self._check_tied(tensor)
                continue
            stored = self.files.read(tensor)
            for ours, place in wanted[tensor]:
                yield ours, _part(stored, ours, place, expected)

    def _place(self, ours: str) -> Place:
        place = self.names.place(ours)
        # A tied weight may stand under either name or both: safetensors' own save_model keeps the output's.
        if ours == "embedding" and self.config.tie_embeddings and place.tensor not in self.files.shapes:
            output = self.names.place("output")
            return output if output.tensor in self.files.shapes else place
        return place

    def _repeats_embedding(self, tensor: str) -> bool:
        """Whether a tensor is the output weight of a tied model, which has the embedding too."""
        if not self.config.tie_embeddings or tensor != self.names.place("output").tensor:
            return False
        return self.names.place("embedding").tensor in self.files.shapes

    def _adds_nothing(self, tensor: str, known: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a tensor is a bias of zeros, as AutoGPTQ writes for modules that have none."""
        module, _, end = tensor.rpartition(".")
        weight = f"{module}.weight"
        if end != "bias" or weight not in known or weight not in self.files.shapes:
            return False
        if not self.files.read(weight).kind.startswith("INT"):
            return False
        return not self.files.read(tensor).dequantise().any()

    def _check_tied(self, tensor: str) -> None:
        """Refuse a tied model whose file holds another output weight: one of the two would be ignored."""
        embedding = self.names.place("embedding").tensor
        equal = self.files.shapes[embedding] == self.files.shapes[tensor]
        if equal:
            one, other = self.files.read(embedding), self.files.read(tensor)
            parts = zip(one.in_parts(_COMPARED_AT_ONCE), other.in_parts(_COMPARED_AT_ONCE), strict=True)
            equal = one.kind == other.kind and all(
                torch.equal(this.dequantise(), that.dequantise()) for (_, this), (_, that) in parts
            )
        if not equal:
            raise ModelError(
                f"{self.files.file_of(tensor)}: tensor {tensor} differs from {embedding} though the config"
                " ties them; set tie_word_embeddings to false in config.json to use both"
            )

    def _describe(self, tensor: str) -> str:
        return f"{self.files.file_of(tensor)}: the tensor {shown(tensor)}"

    @staticmethod
    def _whole(
        place: Place,
        shape: tuple[int, ...],
        expected: Mapping[str, tuple[int, ...]],
        so_far: tuple[int, ...] | None,
    ) -> tuple[int, ...]:
        """The shape of the foreign tensor that has a parameter of this shape at its place."""
        if place.members:
            shape = (sum(expected[member][0] for member in place.members), *shape[1:])
        if place.expert is not None:
            shape = (max(place.expert + 1, so_far[0] if so_far else 0), *shape)
        return shape


def _part(
    stored: StoredTensor, ours: str, place: Place, expected: Mapping[str, tuple[int, ...]]
) -> StoredTensor:
    """What a parameter is of a foreign tensor."""
    if place.expert is not None:
        stored = stored.expert(place.expert)
    if place.members:
        before = place.members[: place.members.index(ours)]
        start = sum(expected[member][0] for member in before)
        stored = stored.rows(slice(start, start + expected[ours][0]))
    if place.order is not None:
        stored = stored.rows(place.order.rows(expected[ours][0]))
    return stored.plus_one() if place.add_one else stored
