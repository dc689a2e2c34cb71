"""The windows of tokens that a training step and an evaluation see: functions of the data and the seed alone.

Shape letters: B windows of a batch, N windows in all, T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from experiments.data.shuffled import Shuffled
from experiments.data.token_data import Stream

AT_ONCE = 1 << 24  # tokens looked at together


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
    """An endless sequence of windows: window i is a function of (train, sequence_length, seed, group, i) alone.

    The stream is cut in windows of sequence_length tokens that do not overlap, and these in groups that stand together;
    a rest shorter than a group is not read. Each pass over the corpus takes the groups in a fresh order drawn from
    (seed, pass), and the windows of each as they stand.

    Args:
        train: the tokens.
        sequence_length: T >= 1.
        seed: >= 0.
        group: windows of a group, >= 1.
    """

    def __init__(self, train: Stream, sequence_length: int, seed: int, group: int = 1):
        if sequence_length < 1 or group < 1:
            raise ValueError(f"sequence_length={sequence_length} and group={group} must be at least 1")
        if len(train) < group * sequence_length:
            needed = "one window" if group == 1 else f"a group of {group} windows"
            raise ValueError(
                f"the corpus has {len(train)} training tokens, fewer than {needed} of sequence_length="
                f"{sequence_length}: choose a larger corpus or a shorter sequence"
            )
        self.train, self.sequence_length, self.seed, self.group = train, sequence_length, seed, group
        self.groups = len(train) // (group * sequence_length)
        self._pass, self._order = 0, Shuffled(self.groups, [seed, 0])

    def batch(self, start: int, size: int) -> Tensor:
        """Windows number start to start + size - 1, int64 [size, sequence_length]."""
        if start < 0 or size < 1:
            raise ValueError(f"no batch of size={size} from start={start}: start must be >= 0 and size >= 1")
        T = self.sequence_length
        offsets = [self._window(i) * T for i in range(start, start + size)]
        return torch.from_numpy(np.stack([self.train[o : o + T] for o in offsets]).astype(np.int64))

    def _window(self, index: int) -> int:
        group, member = divmod(index, self.group)
        number, position = divmod(group, self.groups)
        if number != self._pass:
            self._pass, self._order = number, Shuffled(self.groups, [self.seed, number])
        return self._order[position] * self.group + member


def document_starts(tokens: Tensor, eot: int) -> Tensor:
    """True [B, T] where a document begins in windows [B, T]: at the first token of each, and behind every eot."""
    starts_BT = torch.ones_like(tokens, dtype=torch.bool)
    starts_BT[:, 1:] = tokens[:, :-1] == eot
    return starts_BT


def document_lengths(train: Stream, eot: int, sequence_length: int) -> dict[int, float]:
    """Count the packed documents of each length in a window, in the mean over all windows of the training tokens."""
    rows, total = max(1, AT_ONCE // sequence_length), np.zeros(sequence_length + 1)
    windows = len(train) // sequence_length
    for first in range(0, windows, rows):
        part = train[first * sequence_length : min(first + rows, windows) * sequence_length]
        tokens_NT = torch.from_numpy(np.asarray(part).astype(np.int64)).view(-1, sequence_length)
        begins = np.flatnonzero(document_starts(tokens_NT, eot).numpy())
        total += np.bincount(np.diff(begins, append=tokens_NT.numel()), minlength=sequence_length + 1)
    return {int(length): float(total[length] / windows) for length in np.flatnonzero(total)}


def heldout_windows(heldout: np.ndarray, sequence_length: int) -> tuple[Tensor, Tensor | None]:
    """Every held-out token exactly once, in order: full windows int64 [N, T], and the tail int64 [1, t] with 0 < t < T,
    or None."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    tokens = torch.from_numpy(np.asarray(heldout).astype(np.int64))
    full = len(tokens) // sequence_length * sequence_length
    tail = tokens[full:]
    return tokens[:full].view(-1, sequence_length), tail[None] if len(tail) else None
