"""Which key each query sees, by numbers per query and never by a table of pairs.

A query sees one or two runs of keys that lie side by side: those up to its own under causal visibility, a window of
them, those of its document, or its own noised block and the clean blocks before it. So two numbers per run and query
say it all, and a block of queries knows the keys that it has to read and those of them that need a mask.

Shape letters: B sequences, T queries, S keys, R runs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of query and key that are seen; the queries are the last T of the S tokens.

    causal: a query sees its own token and all before it; else all.
    window: of those in each direction so many, its own included; None for all.
    begins, ends: int64 [R, B, T] or [R, 1, T], in place of the two before: query t sees keys begin to end - 1 of each
        run. The runs of one query do not overlap, and one of them is not empty.
    """

    T: int
    S: int
    causal: bool
    window: int | None = None
    begins: Tensor | None = None
    ends: Tensor | None = None

    @property
    def all(self) -> bool:
        """Return True where every query sees every key."""
        unbounded = self.window is None or self.window >= self.S
        return self.begins is None and unbounded and (self.T == 1 or not self.causal)

    @property
    def triangle(self) -> bool:
        """Return True where they are those of plain causal attention."""
        return self.begins is None and self.causal and self.T == self.S and (self.window or self.S) >= self.S

    def ends_of(self, t: int) -> tuple[int, int]:
        """Begin and end of the run of query t, where there are no `begins` and `ends`."""
        at, reach = self.S - self.T + t, self.window or self.S
        return max(0, at - reach + 1), at + 1 if self.causal else min(self.S, at + reach)

    def runs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Begins and ends, [R, B or 1, T] each."""
        if self.begins is not None and self.ends is not None:
            return self.begins, self.ends
        at_T = torch.arange(self.S - self.T, self.S, device=device)
        reach = self.window or self.S
        begins_T = (at_T - reach + 1).clamp(min=0)
        ends_T = at_T + 1 if self.causal else (at_T + reach).clamp(max=self.S)
        return begins_T[None, None], ends_T[None, None]

    def dense(self, device: torch.device) -> Tensor:
        """True at the pairs that are seen, [B or 1, T, S]: a table of them after all, where it is small or has to be
        there."""
        key_S = torch.arange(self.S, device=device)
        begins, ends = (x[..., None] for x in self.runs(device))
        return ((begins <= key_S) & (key_S < ends)).any(0)


class Stretch(NamedTuple):
    """Keys begin to end - 1, which some query of a block sees; every one sees those from `full` to `ragged` - 1."""

    begin: int
    end: int
    full: int
    ragged: int


class Block(NamedTuple):
    """Queries begin to end - 1 and the stretches of keys that they read, one per run that is not empty."""

    begin: int
    end: int
    stretches: list[tuple[int, Stretch]]

    @property
    def keys(self) -> int:
        return sum(stretch.end - stretch.begin for _, stretch in self.stretches)


def blocks_of(pairs: Pairs, size: int) -> list[list[Block]]:
    """Return the blocks of `size` queries of each sequence; one list for all of them where they see the same."""
    places = [(first, min(first + size, pairs.T)) for first in range(0, pairs.T, size)]
    if pairs.begins is None or pairs.ends is None:
        found = []
        for first, end in places:
            (begin, least), (full, last) = pairs.ends_of(first), pairs.ends_of(end - 1)
            found.append(Block(first, end, [(0, _stretch(begin, last, full, least))]))
        return [found]
    begins, ends = pairs.begins, pairs.ends
    empty = begins >= ends
    tables = [
        _per_block(begins.masked_fill(empty, pairs.S), size, torch.amin, pairs.S),
        _per_block(ends.masked_fill(empty, 0), size, torch.amax, 0),
        _per_block(begins, size, torch.amax, 0),
        _per_block(ends, size, torch.amin, pairs.S),
    ]
    numbers = torch.stack(tables, -1).tolist()  # [R, B, blocks, 4]
    return [
        [
            Block(*place, [(r, _stretch(*run[b][n])) for r, run in enumerate(numbers) if run[b][n][0] < run[b][n][1]])
            for n, place in enumerate(places)
        ]
        for b in range(begins.shape[1])
    ]


def _per_block(x: Tensor, size: int, reduce, padding: int) -> Tensor:
    """Reduce [R, B, T] to [R, B, blocks]."""
    pad = -x.shape[-1] % size
    return reduce(torch.nn.functional.pad(x, (0, pad), value=padding).unflatten(-1, (-1, size)), dim=-1)


def _stretch(begin: int, end: int, full: int, ragged: int) -> Stretch:
    full = min(max(full, begin), end)
    return Stretch(begin, end, full, min(max(ragged, full), end))
