"""Modular addition: all sums of two numbers modulo a third, some of which are trained on and the others held out.

Shape letters: N equations of three tokens, P numbers.
"""

import hashlib
import math

import numpy as np

from experiments.data.token_data import TokenData, token_dtype

EQUATION = 3  # tokens: a, b and the answer


def modular_addition(modulus: int, train_fraction: float, sequence_length: int, seed: int) -> TokenData:
    """Returns the equations a, b, (a + b) mod P as data, end to end, with the answers marked (Power et al., arXiv
    2201.02177).

    A number is the token of its own id, and eot, which stands in front of a sequence and never in it, is id P. The
    published equations have tokens for the operation and for the equals sign too; always the same, they say nothing.
    One answer counts as one byte, so bits per byte are bits per answer, of which whoever knows nothing has log2(P).

    Args:
        modulus: P, at least 2.
        train_fraction: of all P^2 pairs in order, a and b apart from b and a, rounded to whole ones.
        sequence_length: 3 tokens, an equation to a window.
        seed: of the draw of the pairs that are trained on, and of the order of both parts.

    Raises:
        ValueError: a setting is out of range, or one of the parts is empty.
    """
    if modulus < 2:
        raise ValueError(f"modulus={modulus} must be at least 2")
    if sequence_length != EQUATION:
        raise ValueError(f"sequence_length={sequence_length} must be {EQUATION}, the tokens of an equation")
    pairs = modulus**2
    trained = math.floor(train_fraction * pairs + 0.5)
    if not 0 < trained < pairs:
        raise ValueError(
            f"train_fraction={train_fraction} must leave some of the {pairs} pairs of modulus={modulus} to train on "
            "and some to hold out"
        )
    first_N, second_N = np.divmod(np.random.default_rng(seed).permutation(pairs), modulus)
    tokens_N3 = np.stack([first_N, second_N, (first_N + second_N) % modulus], axis=1).astype(token_dtype(modulus + 1))
    answers_N3 = np.tile(np.arange(EQUATION) == EQUATION - 1, (pairs, 1))
    train, heldout = (part.reshape(-1) for part in np.split(tokens_N3, [trained]))
    digest = hashlib.sha256(f"{modulus} ".encode() + train.tobytes() + b" " + heldout.tobytes())
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=pairs - trained,
        vocab_size=modulus + 1,
        eot=modulus,
        digest=digest.hexdigest(),
        name=f"modular_addition/{modulus}",
        pieces=[*(f"{number} ".encode() for number in range(modulus)), b""],
        train_answers=answers_N3[:trained].reshape(-1),
        heldout_answers=answers_N3[trained:].reshape(-1),
    )
