"""Windows made of whole examples, in which only answers are learnt.

Shape letters: N windows, T tokens, V ids.
"""

import hashlib
import logging
import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.data.environments.contracts import Environment
from experiments.data.token_data import TokenData, token_dtype

log = logging.getLogger(__name__)


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
    """One id per byte of an alphabet, in their order, and eot. Where the alphabet begins with NUL, id 0 is padding."""

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
    """Returns whether the sha256 of the key, read as a number in [0, 1), is below the fraction, as in
    `token_data.prepare`."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big") < math.floor(fraction * 2**256)


def example_data(
    train: Iterable[Sequence[Example]],
    heldout: Iterable[Sequence[Example]],
    sequence_length: int,
    pieces: list[bytes],
    eot: int,
    name: str,
    padding: int = 0,
    fill: bool = False,
    group: int = 1,
    environment: Environment | None = None,
) -> TokenData:
    """Returns windows as data: each holds some examples, in order, and behind them padding up to its end.

    Padding is not learnt. `heldout_bytes` are those of the held-out answers, eot having none, so bits per byte are what
    the answers cost with their ends, per byte of answers.

    Args:
        train, heldout: what each window holds, at most sequence_length tokens.
        sequence_length: T.
        pieces, eot: the vocabulary.
        padding: an id that is not eot.
        fill: put eot there in place of padding, and learn it.
        group, environment: as in `TokenData`.

    Raises:
        ValueError: there is nothing to train on, no byte of an answer is held out, or padding would be taken for the
            end.
    """
    if padding == eot:
        raise ValueError(f"padding={padding} must not be eot, which is learnt")
    dtype = token_dtype(len(pieces))
    (tokens, answers), (heldout_tokens, heldout_answers) = (
        _windows(list(part), sequence_length, dtype, eot if fill else padding, fill) for part in (train, heldout)
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
        filled=fill,
        environment=environment,
    )


def _windows(
    contents: list[Sequence[Example]], length: int, dtype: np.dtype, rest: int, learnt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and answers, end to end; behind the examples of a window stands `rest`, which is learnt or not."""
    tokens_NT = np.full((len(contents), length), rest, dtype)
    answers_NT = np.full((len(contents), length), learnt)
    for n, examples in enumerate(contents):
        end = 0
        for example in examples:
            start, end = end, end + len(example.tokens)
            tokens_NT[n, start:end] = example.tokens
            answers_NT[n, start:end] = example.answers
    return tokens_NT.reshape(-1), answers_NT.reshape(-1)


def fitting(lengths: Sequence[int], sequence_length: int, drop_longer: bool, what: str) -> list[bool]:
    """Returns which examples of these numbers of tokens fit into a window; how many do not is logged.

    Raises:
        ValueError: some do not, and they are not to be dropped.
    """
    fit = [length <= sequence_length for length in lengths]
    if longer := fit.count(False):
        said = f"{longer} of {len(fit)} {what} are longer than sequence_length={sequence_length} tokens"
        if not drop_longer:
            raise ValueError(
                f"{said}, the longest has {max(lengths)}: raise data.sequence_length, or leave them out with "
                "data.tokens.drop_longer=true"
            )
        log.warning("%s and are left out", said)
    return fit


def packed(examples: Sequence[Example], sequence_length: int) -> list[list[Example]]:
    """Returns what each window holds: every example once and whole, each no longer than a window.

    From the longest to the shortest, each goes where it leaves the least room (best fit decreasing: D. S. Johnson,
    "Fast algorithms for bin packing", J. Comput. Syst. Sci. 8, 1974).
    """
    windows, with_room, rooms = [], defaultdict(list), []  # rooms: the keys of with_room that have windows, rising
    for example in sorted(examples, key=lambda example: len(example.tokens), reverse=True):
        length = len(example.tokens)
        place = bisect_left(rooms, length)
        if place == len(rooms):
            window, room = [], sequence_length
            windows.append(window)
        else:
            room = rooms[place]
            window = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        window.append(example)
        left = room - length
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(window)
    return windows
