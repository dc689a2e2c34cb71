"""Training on one data set, and held-out text of others."""

import hashlib
import json
from dataclasses import replace

import numpy as np

from experiments.data.token_data import TokenData


def heldout_elsewhere(data: TokenData, tests: list[TokenData], tokens: int) -> TokenData:
    """The training tokens of one data set with the first held-out tokens of others, as many of each, one behind the
    other: bits per byte are those of all tests together.

    Args:
        tokens: of each test; a multiple of the run's sequence length, so that no window has tokens of two.

    Raises:
        ValueError: when there are no tests, they have another vocabulary, or one of them has fewer held-out tokens.
    """
    if not tests:
        raise ValueError("tests=[]: give at least one data set whose held-out text is read")
    for test in tests:
        if (test.pieces, test.eot) != (data.pieces, data.eot):
            raise ValueError(f"{test.name} and {data.name} have different vocabularies: give both the same tokenizer")
        if not 1 <= tokens <= len(test.heldout):
            raise ValueError(f"tokens={tokens} must be from 1 to the {len(test.heldout)} that {test.name} holds out")
    heldout = np.concatenate([test.heldout[:tokens] for test in tests])
    made_of = [data.digest, [test.digest for test in tests], tokens]
    return replace(
        data,
        heldout=heldout,
        heldout_bytes=int(byte_lengths(data, heldout).sum()),
        heldout_answers=None,
        heldout_entropy=None,
        digest=hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        name=f"{data.name} tested on {', '.join(test.name for test in tests)}",
    )


def byte_lengths(data: TokenData, tokens: np.ndarray) -> np.ndarray:
    """Bytes that each of these tokens stands for."""
    return np.array([len(piece) for piece in data.pieces])[tokens]
