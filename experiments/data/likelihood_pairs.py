"""Preferences that are made: two sequences of a hidden Markov language, of which mostly the likelier one is chosen.

Shape letters: P pairs, N sequences, T tokens.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Generator, Tensor

from experiments.data.hidden_markov import AT_ONCE, HiddenMarkovLanguage
from experiments.data.token_data import TokenData, token_dtype


def likelihood_pairs(
    language: HiddenMarkovLanguage,
    sequence_length: int,
    train_pairs: int,
    heldout_pairs: int,
    temperature: float,
    seed: int,
) -> TokenData:
    """Returns pairs of independent sequences of the language as data: groups of two windows, the chosen one first.

    A sequence is chosen with probability sigmoid(difference of their log-likelihoods per symbol / temperature) (Bradley
    and Terry, Biometrika 39, 1952), in the held-out pairs as well. The vocabulary is that of `hidden_markov`, so that a
    reward model which learns from them can judge what a model of that data writes; as there, no eot occurs and one
    symbol counts as one byte.

    Args:
        language: where sequences and their likelihoods come from.
        sequence_length: T, symbols of each.
        train_pairs, heldout_pairs: of each part. The held-out ones do not depend on train_pairs.
        temperature: above 0, in nats per symbol.
        seed: of sequences and labels.

    Raises:
        ValueError: a setting is out of range.
    """
    if train_pairs < 1 or heldout_pairs < 1 or not 0 < temperature < math.inf:
        raise ValueError(
            f"train_pairs={train_pairs}, heldout_pairs={heldout_pairs}, temperature={temperature}: there must be at "
            "least 1 pair in each part, and a finite temperature above 0"
        )
    generator = torch.Generator().manual_seed(seed)
    # The held-out part first, so that it stays the same when train_pairs is changed.
    heldout, train = (
        np.concatenate(
            [
                ranked(language, min(AT_ONCE, pairs - start), sequence_length, temperature, generator).flatten().numpy()
                for start in range(0, pairs, AT_ONCE)
            ]
        ).astype(token_dtype(language.symbols + 1))
        for pairs in (heldout_pairs, train_pairs)
    )
    digest = hashlib.sha256(f"{language.symbols} pairs ".encode() + heldout.tobytes() + b" " + train.tobytes())
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=len(heldout),
        vocab_size=language.symbols + 1,
        eot=language.symbols,
        digest=digest.hexdigest(),
        name=f"likelihood_pairs/{language.states}x{language.symbols}",
        pieces=[f"{symbol} ".encode() for symbol in range(language.symbols)] + [b""],
        group=2,
    )


def ranked(
    language: HiddenMarkovLanguage, pairs: int, sequence_length: int, temperature: float, generator: Generator
) -> Tensor:
    """Returns pairs of sequences [P, 2, T], the chosen one first."""
    tokens_P2T = language.sample(2 * pairs, sequence_length, generator).view(pairs, 2, sequence_length)
    worth_P2 = language.log_likelihood(tokens_P2T.flatten(0, 1)).view(pairs, 2) / sequence_length
    first_P = torch.sigmoid((worth_P2[:, 0] - worth_P2[:, 1]) / temperature)
    swapped_P = torch.rand(pairs, dtype=torch.float64, generator=generator) >= first_P
    return torch.where(swapped_P[:, None, None], tokens_P2T.flip(1), tokens_P2T)
