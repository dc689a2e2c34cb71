"""Disjoint parts of a corpus that differ by chance alone."""

import hashlib
from dataclasses import replace

import numpy as np

from experiments.data.token_data import TokenData


def part_of_windows(data: TokenData, sequence_length: int, train_tokens: int, part: int) -> TokenData:
    """The same data with only a part of its training windows: of one random order of all the ones from number part * n
    on, n = train_tokens / sequence_length of them. Parts of equal length have none in common, and come from the same
    documents.

    Raises:
        ValueError: where marked answers or groups of windows would be torn, for tokens that are no whole windows, and
            for a part that lies beyond the corpus.
    """
    if data.train_answers is not None or data.group != 1:
        raise ValueError(f"{data.name} marks answers or groups windows, which go together: choose data of plain text")
    n, rest = divmod(train_tokens, sequence_length)
    windows = len(data.train) // sequence_length
    if n < 1 or rest or not 0 <= part < windows // n:
        raise ValueError(
            f"train_tokens={train_tokens} and part={part} must be whole windows of sequence_length={sequence_length} "
            f"within the {windows} that there are"
        )
    numbers = np.random.default_rng(0).permutation(windows)[part * n : (part + 1) * n]
    train = np.concatenate([data.train[i * sequence_length : (i + 1) * sequence_length] for i in numbers])
    digest = hashlib.sha256(f"{data.digest} {sequence_length} {train_tokens} {part}".encode()).hexdigest()
    return replace(data, train=train, digest=digest, name=f"{data.name}, part {part} of {train_tokens}")
