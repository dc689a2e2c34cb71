"""A corpus whose training text is in disorder here and there; what is held out stays as it is."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from experiments.data.token_data import Corpus, Stream, TokenData, Tokenizer, prepare, read_blocks

Disorder = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True, eq=False)
class Spoiled:
    """A stream in blocks, some of which are in disorder, read as one stream. A rest shorter than a block is as it was.

    disorder: of a block. fraction: of the blocks. length: tokens of a block.
    """

    stream: Stream
    disorder: Disorder
    fraction: float
    length: int
    seed: int

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: slice, /) -> np.ndarray:
        return read_blocks(self._block, self.length, len(self), index)

    def _block(self, i: int) -> np.ndarray:
        tokens = np.asarray(self.stream[i * self.length : (i + 1) * self.length])
        rng = np.random.default_rng([self.seed, i])
        return self.disorder(tokens, rng) if rng.random() < self.fraction and len(tokens) == self.length else tokens


def spoiled(
    corpus: Corpus,
    tokenizer: Tokenizer,
    heldout_bytes: int,
    heldout_fraction: float,
    fraction: float,
    order: str,
    block: int = 2048,
    seed: int = 0,
) -> TokenData:
    """Tokens of a corpus as `prepare` gives them, of whose training blocks a fraction is in disorder: with their lines
    in random order ("lines"), so that no line follows from those before, or all their tokens ("tokens"), so that
    nothing is left but how frequent each is.

    Args:
        block: tokens of a block, >= 1.

    Raises:
        ValueError: for a fraction outside [0, 1], an unknown order, a block below 1, or lines of a tokenizer that has
            no token of its own for their end.
    """
    if not 0 <= fraction <= 1 or block < 1:
        raise ValueError(f"fraction={fraction} must be from 0 to 1, and block={block} at least 1 token")
    data = prepare(corpus, tokenizer, heldout_bytes, heldout_fraction)
    if order == "tokens":
        disorder: Disorder = lambda tokens, rng: rng.permutation(tokens)  # noqa: E731
    elif order == "lines":
        ends = [i for i, piece in enumerate(data.pieces) if b"\n" in piece]
        if [data.pieces[i] for i in ends] != [b"\n"]:
            raise ValueError(f"{tokenizer.name} has tokens that hold more than the end of a line: take bytes")
        disorder = in_lines(ends[0])
    else:
        raise ValueError(f"order={order!r} must be 'lines' or 'tokens'")
    made_of = [data.digest, fraction, order, block, seed]
    return replace(
        data,
        train=Spoiled(data.train, disorder, fraction, block, seed),
        digest=hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        name=f"{data.name} ({fraction:.3g} of it with {order} in disorder)",
    )


def in_lines(end: int) -> Disorder:
    """Return the disorder of lines, each of which reaches to an `end`, and the last to that of the block."""

    def disorder(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        lines = np.split(tokens, np.flatnonzero(tokens[:-1] == end) + 1)
        return np.concatenate([lines[i] for i in rng.permutation(len(lines))])

    return disorder
