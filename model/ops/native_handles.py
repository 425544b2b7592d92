"""What the native ops hand on while they record: rows that are written, and products that still wait."""

from dataclasses import dataclass

from torch import Tensor

from model.ops import library
from model.ops.library import InputRows
from model.ops.native_adapters import AdapterPanels
from model.ops.panels import Matrix


@dataclass(frozen=True, slots=True)
class Hidden:
    """Float32 rows of the residual stream."""

    rows: Tensor
    selected: bool = False


@dataclass(frozen=True, slots=True)
class Floats:
    """Float32 rows beside the residual stream; where there is a weight, their RMS norm is meant."""

    rows: Tensor
    weight: Tensor | None = None
    epsilon: float = 0.0


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rows in the form that a product reads."""

    rows: InputRows
    selected: bool = False
    source: Floats | None = None
    """What was quantised, where that is at hand: a router reads it."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product that is not recorded yet: what comes next decides where it goes."""

    rows: Quantised
    weight: Matrix
    bias: Tensor | None = None
    adapters: AdapterPanels | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """The last products of each row's experts and their sum, not recorded yet, as a Product."""

    router: library.Router
    routing: library.Routing
    rows: InputRows
    downs: tuple[library.Panels, ...]


@dataclass(frozen=True, slots=True)
class Queries:
    """Rotated and scaled queries in bfloat16."""

    rows: Tensor
