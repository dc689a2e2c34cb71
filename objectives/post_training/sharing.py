"""Writing and reading of answers by processes that share a batch: each runs a model on its sequences, and all get what
comes of all of them.

Whatever is drawn is drawn by every process for all sequences, so that no answer depends on who runs which.

Shape letters: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from archs.contracts import State
from archs.visibility import Visibility
from objectives.contracts import Model


def shared(model: Model) -> Model:
    """Return a model that all processes ask for the same, without gradients; alone, the model itself."""
    return SharedModel(model) if dist.is_available() and dist.is_initialized() else model


def together(of_rows: Callable[[slice], Tensor], rows: int) -> Tensor:
    """Return what a function makes of so many rows [rows, ...], which each process asks for its own."""
    parts = Parts.of(rows)
    return parts.gathered(of_rows(parts.mine))


@dataclass(frozen=True)
class Parts:
    """Rows as the processes take them: consecutive, of nearly equal numbers; where there are fewer rows than processes,
    each takes all. bounds: where parts begin and end."""

    bounds: tuple[int, ...]

    @classmethod
    def of(cls, rows: int) -> Parts:
        n = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return cls((0, rows) if rows < n else tuple(rows * part // n for part in range(n + 1)))

    @property
    def mine(self) -> slice:
        """The rows of this process."""
        first = dist.get_rank() if len(self.bounds) > 2 else 0
        return slice(*self.bounds[first : first + 2])

    def repeated(self, copies: int) -> Parts:
        """The parts of so many copies of each row, side by side."""
        return Parts(tuple(bound * copies for bound in self.bounds))

    def gathered(self, x: Tensor) -> Tensor:
        """All rows of what each process has of its own."""
        sizes = [end - begin for begin, end in pairwise(self.bounds)]
        if len(sizes) == 1:
            return x
        filled = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])  # all_gather takes equal sizes
        boxes = [torch.empty_like(filled) for _ in sizes]
        dist.all_gather(boxes, filled)
        return torch.cat([box[:size] for box, size in zip(boxes, sizes, strict=True)])


@dataclass(frozen=True, eq=False)
class PartOfState(State):
    """The state of the sequences that this process takes."""

    state: State
    parts: Parts

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def repeat(self, copies: int) -> Self:
        return type(self)(self.state.repeat(copies), self.parts.repeated(copies))


@dataclass(frozen=True)
class SharedModel:
    """A `Model` of which each process runs the blocks on its part of the sequences, and the head on all of them."""

    model: Model

    def hidden(self, tokens_BT: Tensor, visibility: Visibility, time: Tensor | None = None) -> Tensor:
        assert visibility.starts_BL is None  # what is written is not packed
        parts = Parts.of(len(tokens_BT))
        return parts.gathered(self.model.hidden(tokens_BT[parts.mine], visibility, **_told(time, parts)))

    def empty_states(self, batch: int) -> list[State]:
        parts = Parts.of(batch)
        states = self.model.empty_states(parts.mine.stop - parts.mine.start)
        return [PartOfState(state, parts) for state in states]

    def extend(
        self, tokens_BT: Tensor, states: list[State], visibility: Visibility, time: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        held = [state for state in states if isinstance(state, PartOfState)]
        parts = held[0].parts
        told, before = _told(time, parts), [state.state for state in held]
        hidden_BTD, after = self.model.extend(tokens_BT[parts.mine], before, visibility, **told)
        return parts.gathered(hidden_BTD), [PartOfState(state, parts) for state in after]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def _told(time: Tensor | None, parts: Parts) -> dict[str, Tensor]:
    return {} if time is None else {"time": time[parts.mine]}
