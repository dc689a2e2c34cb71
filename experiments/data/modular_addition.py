"""Modular addition: all sums of two numbers modulo a third, some of which are trained on and the others held out.

Shape letters: N equations, T tokens of one, P numbers.
"""

import hashlib
import math

import numpy as np

from experiments.data.token_data import TokenData, token_dtype

EQUATION = 3  # tokens: a, b and the answer


def modular_addition(
    modulus: int, train_fraction: float, sequence_length: int, seed: int, equals: bool = False
) -> TokenData:
    """Returns the equations a, b, (a + b) mod P as data, end to end, with the answers marked (Power et al., arXiv
    2201.02177).

    A number is the token of its own id, and eot, which stands in front of a sequence and never in it, is the last id.
    The published equations have tokens for the operation and for the equals sign too; always the same, they say
    nothing, but where the sum is read from a sign of its own, a and b can be treated alike.
    One answer counts as one byte, so bits per byte are bits per answer, of which whoever knows nothing has log2(P).

    Args:
        modulus: P, at least 2.
        train_fraction: of all P^2 pairs in order, a and b apart from b and a, rounded to whole ones.
        sequence_length: 3 tokens, an equation to a window; 4 with `equals`.
        seed: of the draw of the pairs that are trained on, and of the order of both parts.
        equals: put a sign, the token of id P, in front of the answer.

    Raises:
        ValueError: a setting is out of range, or one of the parts is empty.
    """
    if modulus < 2:
        raise ValueError(f"modulus={modulus} must be at least 2")
    length = EQUATION + equals
    if sequence_length != length:
        raise ValueError(f"sequence_length={sequence_length} must be {length}, the tokens of an equation")
    pairs = modulus**2
    trained = math.floor(train_fraction * pairs + 0.5)
    if not 0 < trained < pairs:
        raise ValueError(
            f"train_fraction={train_fraction} must leave some of the {pairs} pairs of modulus={modulus} to train on "
            "and some to hold out"
        )
    first_N, second_N = np.divmod(np.random.default_rng(seed).permutation(pairs), modulus)
    signs = [np.full(pairs, modulus)] * equals
    tokens_NT = np.stack([first_N, second_N, *signs, (first_N + second_N) % modulus], axis=1)
    answers_NT = np.tile(np.arange(length) == length - 1, (pairs, 1))
    eot = modulus + equals
    train, heldout = (part.reshape(-1).astype(token_dtype(eot + 1)) for part in np.split(tokens_NT, [trained]))
    digest = hashlib.sha256(f"{modulus} ".encode() + train.tobytes() + b" " + heldout.tobytes())
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=pairs - trained,
        vocab_size=eot + 1,
        eot=eot,
        digest=digest.hexdigest(),
        name=f"modular_addition/{modulus}",
        pieces=[*(f"{number} ".encode() for number in range(modulus)), *[b"= "] * equals, b""],
        train_answers=answers_NT[:trained].reshape(-1),
        heldout_answers=answers_NT[trained:].reshape(-1),
    )
