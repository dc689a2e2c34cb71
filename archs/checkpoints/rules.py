"""Rules that make our tensors of those in a file, and those of ours: one for both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`fold` makes the tensors named `ours` of those that a file names `theirs`, each in its order; `unfold` undoes it.
    float32: whether they are float32 in a model of any dtype."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    fold: Callable[[list[Tensor]], Sequence[Tensor]]
    unfold: Callable[[list[Tensor]], Sequence[Tensor]]
    float32: bool = False

    def within(self, ours: str, theirs: str) -> Rule:
        """The same with names that begin so on either side."""
        return replace(
            self,
            ours=tuple(ours + name for name in self.ours),
            theirs=tuple(theirs + name for name in self.theirs),
        )


def one(ours: str, theirs: str, fold: Callable[[Tensor], Tensor], unfold: Callable[[Tensor], Tensor]) -> Rule:
    """A tensor that is made of a single one."""
    return Rule((ours,), (theirs,), lambda x: [fold(x[0])], lambda x: [unfold(x[0])])


def same(ours: str, theirs: str, float32: bool = False) -> Rule:
    return Rule((ours,), (theirs,), list, list, float32)


def transposed(ours: str, theirs: str) -> Rule:
    return one(ours, theirs, torch.t, torch.t)


def taps(ours: str, theirs: str) -> Rule:
    """Taps [C, W] of a convolution whose file has one input channel in each group [C, 1, W]."""
    return one(ours, theirs, lambda x: x[:, 0], lambda x: x[:, None])


def rows(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Rule:
    """A tensor whose rows are those of several, which have so many each."""
    return Rule((ours,), tuple(theirs), lambda x: [torch.cat(x)], lambda x: x[0].split(sizes))


def stacked(ours: str, theirs: Sequence[str], pieces: int = 1) -> Rule:
    """A tensor with one entry per expert, each of the rows of so many consecutive tensors of equal size."""
    return Rule(
        (ours,),
        tuple(theirs),
        lambda x: [torch.stack(x).unflatten(0, (-1, pieces)).flatten(1, 2)],
        lambda x: x[0].unflatten(1, (pieces, -1)).flatten(0, 1).unbind(),
    )


def scaled(ours: str, theirs: str, factor: float) -> Rule:
    """A tensor times a factor, rounded once and never below float32."""

    def times(x: Tensor, factor: float) -> Tensor:
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)

    if factor == 1:
        return same(ours, theirs)
    return one(ours, theirs, lambda x: times(x, factor), lambda x: times(x, 1 / factor))


def shifted(ours: str, theirs: str, shift: float, factor: float = 1.0) -> Rule:
    """(a vector + shift) times a factor, rounded once."""
    if shift == 0 and factor == 1:
        return same(ours, theirs)
    return one(
        ours,
        theirs,
        lambda x: ((x.double() + shift) * factor).to(x.dtype),
        lambda x: (x.double() / factor - shift).to(x.dtype),
    )
