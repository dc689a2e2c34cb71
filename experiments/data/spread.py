"""A short corpus that is like the long one it comes from: pieces from all over it."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from experiments.data.token_data import Stream, TokenData, read_blocks


@dataclass(frozen=True, eq=False)
class Spread:
    """Pieces of a stream, as far apart as they can be, read as one stream.

    count: of pieces, each of `length` tokens; the first stands at the beginning and the last at the end.
    """

    stream: Stream
    count: int
    length: int

    def __len__(self) -> int:
        return self.count * self.length

    def __getitem__(self, index: slice, /) -> np.ndarray:
        return read_blocks(self._piece, self.length, len(self), index)

    def _piece(self, i: int) -> np.ndarray:
        start = i * (len(self.stream) - self.length) // max(self.count - 1, 1)
        return np.asarray(self.stream[start : start + self.length])


def spread(data: TokenData, train_tokens: int, length: int) -> TokenData:
    """The same data with only some of its training tokens, in pieces that lie evenly over all of it: its beginning
    is a document or two, whose names and habits are not those of the held-out text.

    Args:
        length: tokens of a piece, such as a window's.

    Raises:
        ValueError: for tokens that are not so many whole pieces or more than there are, or data with marked answers,
            which a piece may cut.
    """
    if length < 1 or train_tokens < 1 or train_tokens % length or train_tokens > len(data.train):
        raise ValueError(
            f"train_tokens={train_tokens} must be whole pieces of length={length}, at most the {len(data.train)} tokens"
            " that there are"
        )
    if data.train_answers is not None:
        raise ValueError(f"{data.name} has marked answers, which a piece may cut: spread takes text without")
    return replace(
        data,
        train=Spread(data.train, train_tokens // length, length),
        digest=hashlib.sha256(f"{data.digest} spread {train_tokens} {length}".encode()).hexdigest(),
        name=f"{data.name}[{train_tokens} in pieces of {length}]",
    )
