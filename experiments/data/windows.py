"""Which tokens a training step and an evaluation see: functions of the data and the seed alone."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """tokens_BT: int64 windows. answers_BT: bool, the tokens that are trained on and scored, or None for all."""

    tokens_BT: Tensor
    answers_BT: Tensor | None


def check_enough(tokens_available: int, tokens_asked: int, allow_repeats: bool) -> None:
    """
    Raises:
        ValueError: the corpus is shorter than the run, and repeats are not allowed.
    """
    if tokens_asked > tokens_available and not allow_repeats:
        times = f"{tokens_asked / tokens_available:.3g} times" if tokens_available else "without end"
        raise ValueError(
            f"the corpus has {tokens_available} training tokens but the run asks for {tokens_asked}: it "
            f"would be read {times}; choose a larger corpus or a smaller budget, or set "
            "data.allow_repeats=true"
        )


class TrainWindows:
    """An endless sequence of windows: window i is a function of (train, sequence_length, seed, i) alone.

    The stream is cut in windows of sequence_length tokens that do not overlap; a rest shorter than that is
    not read. Each pass over the corpus takes them in a fresh permutation drawn from (seed, pass).

    Args:
        train: 1-D tokens; anything with a length and slices.
        sequence_length: T >= 1.
        seed: >= 0.
    """

    def __init__(self, train: np.ndarray, sequence_length: int, seed: int):
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        if len(train) < sequence_length:
            raise ValueError(
                f"the corpus has {len(train)} training tokens, fewer than one window of sequence_length="
                f"{sequence_length}: choose a larger corpus or a shorter sequence"
            )
        self.train, self.sequence_length, self.seed = train, sequence_length, seed
        self.windows = len(train) // sequence_length
        self._pass, self._order = -1, np.empty(0, np.int64)

    def batch(self, start: int, size: int) -> Tensor:
        """tokens_BT, int64 [size, sequence_length]: windows number start to start + size - 1."""
        if start < 0 or size < 1:
            raise ValueError(f"no batch of size={size} from start={start}: start must be >= 0 and size >= 1")
        T = self.sequence_length
        offsets = [self._window(i) * T for i in range(start, start + size)]
        return torch.from_numpy(np.stack([self.train[o : o + T] for o in offsets]).astype(np.int64))

    def _window(self, index: int) -> int:
        number, position = divmod(index, self.windows)
        if number != self._pass:
            self._order = np.random.default_rng([self.seed, number]).permutation(self.windows)
            self._pass = number
        return int(self._order[position])


def heldout_windows(heldout: np.ndarray, sequence_length: int) -> tuple[Tensor, Tensor | None]:
    """Every held-out token exactly once, in order: (full int64 [N, T], tail int64 [1, t] with 0 < t < T, or
    None)."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    tokens = torch.from_numpy(np.asarray(heldout).astype(np.int64))
    full = len(tokens) // sequence_length * sequence_length
    tail = tokens[full:]
    return tokens[:full].view(-1, sequence_length), tail[None] if len(tail) else None
