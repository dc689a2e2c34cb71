"""Windows made of whole examples, in which only answers are learnt.

Shape letters: N windows, T tokens, V ids.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.data.environments.contracts import Environment
from experiments.data.token_data import TokenData, token_dtype

PADDING = 0  # the NUL byte, in the vocabulary of bytes and in those made here


@dataclass(frozen=True, eq=False)
class Example:
    """One document with its end.

    tokens: 1-D ids.
    answers: bool, as many; what is learnt.
    """

    tokens: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, prompt: np.ndarray, answer: np.ndarray, eot: int) -> "Example":
        """Returns the ids of a prompt, of its answer and eot, the latter two of which are learnt."""
        tokens = np.concatenate([prompt, answer, [eot]])
        return cls(tokens, np.arange(len(tokens)) >= len(prompt))


@dataclass(frozen=True)
class ByteVocabulary:
    """One id per byte of an alphabet, in their order, and eot."""

    alphabet: bytes

    @property
    def pieces(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in self.alphabet), b""]

    @property
    def eot(self) -> int:
        return len(self.alphabet)

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of text that is made of the alphabet."""
        ids = np.zeros(256, np.int64)
        ids[list(self.alphabet)] = np.arange(len(self.alphabet))
        return ids[list(text)]


def held_out(key: bytes, fraction: float) -> bool:
    """Whether the sha256 of the key, read as a number in [0, 1), is below the fraction (as in `token_data.prepare`)."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big") < math.floor(fraction * 2**256)


def example_data(
    train: Iterable[Sequence[Example]],
    heldout: Iterable[Sequence[Example]],
    sequence_length: int,
    pieces: list[bytes],
    eot: int,
    name: str,
    fill: int = PADDING,
    group: int = 1,
    environment: Environment | None = None,
) -> TokenData:
    """Returns windows as data: each holds the examples of one item, in order, and behind them `fill` up to its end.

    What fills a window is learnt where it is eot, and not where it is padding. `heldout_bytes` are those of the
    held-out answers, eot having none, so bits per byte are what the answers cost with their ends, per byte of answers.

    Args:
        train, heldout: what each window holds, at most sequence_length tokens.
        sequence_length: T.
        pieces, eot: the vocabulary, in which 0 is padding.
        fill: PADDING or eot.
        group, environment: as in `TokenData`.

    Raises:
        ValueError: there is nothing to train on, or no byte of an answer is held out.
    """
    dtype = token_dtype(len(pieces))
    (tokens, answers), (heldout_tokens, heldout_answers) = (
        _windows(list(part), sequence_length, dtype, fill, fill == eot) for part in (train, heldout)
    )
    size_V = np.array([len(piece) for piece in pieces])
    heldout_bytes = int(size_V[heldout_tokens[heldout_answers]].sum())
    if not len(tokens) or not heldout_bytes:
        raise ValueError(
            f"{name} has {len(tokens) // sequence_length} windows to train on and {heldout_bytes} bytes of held-out "
            "answers: both must be at least 1, so give more examples or hold out another part of them"
        )
    digest = hashlib.sha256(repr((pieces, eot, sequence_length, group)).encode())
    for part in (tokens, answers, heldout_tokens, heldout_answers):
        digest.update(part.tobytes())
    return TokenData(
        train=tokens,
        heldout=heldout_tokens,
        heldout_bytes=heldout_bytes,
        vocab_size=len(pieces),
        eot=eot,
        digest=digest.hexdigest(),
        name=name,
        pieces=pieces,
        train_answers=answers,
        heldout_answers=heldout_answers,
        group=group,
        environment=environment,
    )


def _windows(
    contents: list[Sequence[Example]], length: int, dtype: np.dtype, fill: int, learnt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and answers, end to end."""
    tokens_NT = np.full((len(contents), length), fill, dtype)
    answers_NT = np.full((len(contents), length), learnt)
    for n, examples in enumerate(contents):
        end = 0
        for example in examples:
            start, end = end, end + len(example.tokens)
            tokens_NT[n, start:end] = example.tokens
            answers_NT[n, start:end] = example.answers
    return tokens_NT.reshape(-1), answers_NT.reshape(-1)
