"""Several data sets of one vocabulary as one, in given proportions.

Shape letters: N windows, T tokens of a window.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.data.shuffled import Shuffled
from experiments.data.token_data import Stream, TokenData, read_blocks


@dataclass(frozen=True, eq=False)
class Interleaved:
    """Windows of several streams in one order, read as one stream.

    taken: how many windows of each, the first ones of its own order. order: that of all N, numbered from the first
    stream's to the last one's. length: T.
    """

    streams: Sequence[Stream]
    taken: Sequence[int]
    orders: Sequence[Shuffled]
    order: Shuffled
    length: int

    def __len__(self) -> int:
        return sum(self.taken) * self.length

    def __getitem__(self, index: slice, /) -> np.ndarray:
        return read_blocks(self._window, self.length, len(self), index)

    def _window(self, i: int) -> np.ndarray:
        part, number = 0, self.order[i]
        while number >= self.taken[part]:
            part, number = part + 1, number - self.taken[part]
        offset = self.orders[part][number] * self.length
        return self.streams[part][offset : offset + self.length]


def mixture(parts: list[TokenData], weights: list[float], sequence_length: int, seed: int) -> TokenData:
    """Windows of several data sets, each of them the given share of all, in an order drawn from the seed.

    Held out is what the first part holds out, so that bits per byte are those of the first part, and compare with runs
    on it alone. No window has tokens of two parts. The mixture ends where a part would have to be read twice: the
    windows of each part that are in it are drawn from the seed too, and `data.allow_repeats` reads the same ones again.
    Where a part marks answers, all tokens of parts that do not are trained on.

    Args:
        weights: one per part, above 0, in any unit.
        sequence_length: T, that of the run. Parts whose windows are whole examples are to have the same.

    Raises:
        ValueError: when the parts have different vocabularies, a weight or length is out of range, or a part is too
            short for a window or for its weight.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"a mixture of {len(parts)} parts with weights={list(weights)}: give one weight for each part")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)} must be above 0: leave out a part of which nothing is wanted")
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    first = parts[0]
    for part in parts:
        if (part.pieces, part.eot) != (first.pieces, first.eot):
            raise ValueError(
                f"a mixture has one vocabulary: {part.name} has {part.vocab_size} ids that stand for other bytes than "
                f"the {first.vocab_size} of {first.name}; give both the same tokenizer"
            )
        if part.group != 1 or part.filled != first.filled:
            raise ValueError(
                f"windows of a mixture stand alone, and are all filled or all padded: {part.name} has groups of "
                f"{part.group} and filled={part.filled}, {first.name} filled={first.filled}; leave one of them out"
            )
        if len(part.train) < sequence_length:
            raise ValueError(
                f"{part.name} has {len(part.train)} training tokens, fewer than one window of sequence_length="
                f"{sequence_length}: leave it out, or take shorter windows"
            )
    shares = [weight / sum(weights) for weight in weights]
    available = [len(part.train) // sequence_length for part in parts]
    total = min(int(n / share) for n, share in zip(available, shares, strict=True))
    taken = [min(n, round(share * total)) for n, share in zip(available, shares, strict=True)]
    for part, number, share in zip(parts, taken, shares, strict=True):
        if number < 1:
            raise ValueError(
                f"{part.name} has a share of {share:.3g} in a mixture of {total} windows, which is none: raise its "
                "weight, or take more data or shorter windows"
            )
    orders = [Shuffled(n, [seed, p]) for p, n in enumerate(available)]
    order = Shuffled(sum(taken), [seed, len(parts)])

    def interleaved(streams: Sequence[Stream]) -> Interleaved:
        return Interleaved(streams, taken, orders, order, sequence_length)

    answers = None
    if any(part.train_answers is not None for part in parts):
        answers = interleaved([_answers(part) for part in parts])[:]
    names = ", ".join(f"{part.name} {share:.3g}" for part, share in zip(parts, shares, strict=True))
    made_of = [[part.digest for part in parts], shares, sequence_length, seed]
    return replace(
        first,
        train=interleaved([part.train for part in parts]),
        train_answers=answers,
        digest=hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        name=f"mixture({names})",
    )


def _answers(part: TokenData) -> np.ndarray:
    return np.broadcast_to(True, len(part.train)) if part.train_answers is None else part.train_answers
