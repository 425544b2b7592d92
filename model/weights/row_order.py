"""The order of a head's query and key rows: the ops rotate (i, i + head_dim / 2), checkpoints may differ.

Turning rows round once, when they are loaded, changes no product of a query with a key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How a checkpoint lays the rows of one head out."""

    head_dim: int
    rotary_dim: int
    """The first so many rows are rotated, the others stay."""
    interleaved: bool
    """Whether its pairs are neighbours (2i, 2i + 1), and not (i, i + rotary_dim / 2)."""

    @property
    def is_ours(self) -> bool:
        """Whether nothing is to be moved."""
        return not self.interleaved and self.rotary_dim == self.head_dim

    def rows(self, num_rows: int) -> Tensor:
        """Where each of our rows stands in the checkpoint: [rows]; ValueError if they make no whole heads."""
        if num_rows % self.head_dim:
            raise ValueError(f"{num_rows} rows are no whole heads of {self.head_dim}")
        rotated = torch.arange(self.rotary_dim)
        pairs = rotated.view(-1, 2).t() if self.interleaved else rotated.view(2, -1)  # [2, rotary_dim / 2]
        rest = torch.arange(self.rotary_dim, self.head_dim).view(2, -1)
        head = torch.cat((pairs, rest), dim=1).flatten()  # [head_dim]
        heads = torch.arange(0, num_rows, self.head_dim)
        return (heads[:, None] + head).flatten()
