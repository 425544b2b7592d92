"""Which foreign tensor, or which part of one, each of our parameters is.

Our names: `embedding`, `final_norm`, `output` (absent if tied); in `layers.{i}.`: `attention_norm`,
`mlp_norm`, `attention_output_norm`, `mlp_output_norm`, `attention.{query,key,value,output}` with `.bias`,
`attention.{query_norm,key_norm}`, `mlp.{gate,up,down,router}`, `mlp.{experts,shared}.{e}.{gate,up,down}`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.weights.row_order import RowOrder

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Fused:
    """One of several parameters whose rows stand one after the other in a foreign tensor."""

    tensor: str
    members: Sequence[str]
    """Our names in their order; `#` is the layer."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """One of several experts in a foreign tensor [experts, ...]: the last number of our name says which."""

    tensor: str
    members: Sequence[str] = ()
    """Our names of those whose rows stand one after the other in each expert's part; empty: it is one's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter stands."""

    tensor: str
    expert: int | None = None
    """Index into the tensor's first axis."""
    members: tuple[str, ...] = ()
    """Our names of all parameters that share the tensor's rows, in order."""
    order: RowOrder | None = None
    """How its rows stand, where that is not our way."""
    add_one: bool = False
    """Whether the tensor holds the parameter less one (Gemma's norms)."""


@dataclass(frozen=True, slots=True)
class NameTable:
    """One format's names of one model's parameters."""

    names: Mapping[str, str | Fused | Stacked]
    """Ours -> theirs, each number replaced by `#`."""
    passed_over: str = r"(?!)"
    """A regular expression of tensors that are known and not needed."""
    order: RowOrder | None = None
    """Of the rows of queries and keys."""
    less_one: frozenset[str] = frozenset()
    """Our names, numbers replaced by `#`, of parameters that are stored less one."""

    def place(self, ours: str) -> Place:
        """Where our parameter `ours` stands (KeyError if this format has no place for it)."""
        pattern = _NUMBER.sub("#", ours)
        numbers = [int(number) for number in _NUMBER.findall(ours)]
        turned = re.fullmatch(r"layers\.#\.attention\.(query|key)(\.bias)?", pattern)
        order = self.order if turned and self.order is not None and not self.order.is_ours else None
        theirs, add_one = self.names[pattern], pattern in self.less_one
        match theirs:
            case Fused(tensor, members):
                mine = tuple(_numbered(member, numbers) for member in members)
                return Place(_numbered(tensor, numbers), members=mine, order=order, add_one=add_one)
            case Stacked(tensor, members):
                mine = tuple(_numbered(member, numbers) for member in members)
                tensor = _numbered(tensor, numbers)
                return Place(tensor, expert=numbers[-1], members=mine, order=order, add_one=add_one)
            case tensor:
                return Place(_numbered(tensor, numbers), order=order, add_one=add_one)

    def is_passed_over(self, tensor: str) -> bool:
        """Whether a foreign tensor is known and not needed."""
        return re.fullmatch(self.passed_over, tensor) is not None


def _numbered(pattern: str, numbers: Sequence[int]) -> str:
    """Fill the `#` of a pattern in, in order."""
    parts = pattern.split("#")
    return "".join(part + str(number) for part, number in zip(parts[:-1], numbers, strict=False)) + parts[-1]
