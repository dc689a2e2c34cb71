"""Random legal games of Othello as tokens, and the boards behind them (the data of Li et al., arXiv 2210.13382).

Boards are bits: square row * size + column of a board is that bit of a uint64. They are seen by who is to move: `mine`
and `theirs`.

Shape letters: N games, T plies, S squares, V token ids.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from experiments.data.token_data import TokenData, token_dtype

EOT = 0  # stands in front of a game and behind its end
AT_ONCE = 8192  # games drawn together
STEPS = [(rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1) if rows or columns]


@dataclass(frozen=True)
class Othello:
    """The rules, on a board of size x size squares: 4, 6 or 8.

    A token is EOT, 1 + the number of the square that is played, or, behind these, a pass, which is made by who can play
    no square while the other can.

    Raises:
        ValueError: for another size.
    """

    size: int

    def __post_init__(self):
        if self.size not in (4, 6, 8):
            raise ValueError(f"size={self.size} must be 4, 6 or 8")

    @property
    def squares(self) -> int:
        """S."""
        return self.size**2

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.squares + 2

    def start(self, games: int) -> tuple[np.ndarray, np.ndarray]:
        """(mine, theirs) uint64 [N]: two pieces each on the diagonals of the middle."""
        low, high = self.size // 2 - 1, self.size // 2
        mine, theirs = (
            sum(1 << row * self.size + column for row, column in places)
            for places in (((low, high), (high, low)), ((low, low), (high, high)))
        )
        return np.full(games, mine, np.uint64), np.full(games, theirs, np.uint64)

    def playable(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """The squares that may be played, uint64 of the same shape: empty, with a line of theirs to one of mine."""
        found = np.zeros_like(mine)
        for step in STEPS:
            found |= self._moved(self._line(mine, theirs, step), step)
        return found & ~(mine | theirs)

    def allowed(self, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Return which tokens may come next, bool [..., V]: squares, else a pass, else the end."""
        squares = self.bits(self.playable(mine, theirs))
        stuck = ~squares.any(-1, keepdims=True)
        over = stuck & (self.playable(theirs, mine) == 0)[..., None]
        return np.concatenate([over, squares, stuck & ~over], axis=-1)

    def play(self, mine: np.ndarray, theirs: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mine, theirs) for the other player, after each of these tokens, which must be allowed."""
        square = np.clip(token.astype(np.int64) - 1, 0, self.squares - 1).astype(np.uint64)
        placed = np.where((token > EOT) & (token <= self.squares), np.uint64(1) << square, np.uint64(0))
        flipped = np.zeros_like(mine)
        for step in STEPS:
            line = self._line(placed, theirs, step)
            flipped |= np.where(self._moved(line, step) & mine, line, np.uint64(0))
        return theirs & ~flipped, mine | placed | flipped

    def bits(self, board: np.ndarray) -> np.ndarray:
        """The squares of boards, bool [..., S]."""
        return (board[..., None] >> np.arange(self.squares, dtype=np.uint64) & np.uint64(1)).astype(bool)

    def draw(self, games: int, plies: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
        """The first plies of games, int64 tokens [N, T], every token drawn evenly from those allowed, and the nats of
        these draws."""
        (mine, theirs), tokens, nats = self.start(games), [], 0.0
        for _ in range(plies):
            allowed_NV = self.allowed(mine, theirs)
            nats += float(np.log(allowed_NV.sum(1)).sum())
            tokens.append(np.where(allowed_NV, random.random(allowed_NV.shape), -1.0).argmax(1))
            mine, theirs = self.play(mine, theirs, tokens[-1])
        return np.stack(tokens, axis=1), nats

    def boards(self, tokens_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mine, theirs) in front of each token of games, uint64 [N, T]."""
        (mine, theirs), seen = self.start(len(tokens_NT)), []
        for token_N in tokens_NT.T:
            seen.append((mine, theirs))
            mine, theirs = self.play(mine, theirs, token_N)
        return np.stack([board[0] for board in seen], axis=1), np.stack([board[1] for board in seen], axis=1)

    def _line(self, start: np.ndarray, theirs: np.ndarray, step: tuple[int, int]) -> np.ndarray:
        """The squares of theirs that lie without a gap behind those of start."""
        line = self._moved(start, step) & theirs
        for _ in range(self.size - 3):
            line |= self._moved(line, step) & theirs
        return line

    def _moved(self, board: np.ndarray, step: tuple[int, int]) -> np.ndarray:
        """A board moved by rows and columns; what leaves it is lost."""
        rows, columns = step
        by = rows * self.size + columns
        moved = board << np.uint64(by) if by > 0 else board >> np.uint64(-by)
        edge = None if columns == 0 else 0 if columns > 0 else self.size - 1  # nothing is moved onto this column
        kept = sum(1 << s for s in range(self.squares) if s % self.size != edge)
        return moved & np.uint64(kept)


def othello(size: int, sequence_length: int, train_games: int, heldout_games: int, seed: int) -> TokenData:
    """Random games as data, end to end: the squares played, and nothing of the boards.

    A window of sequence_length is one game, cut there or filled with ends. One token counts as one byte, so bits per
    byte are bits per ply. The entropy of the draws is known.

    Args:
        size: of the board.
        sequence_length: plies; size ** 2 - 4 for whole games, if nobody passes.
        train_games, heldout_games: drawn apart, so that the first plies of many are the same.
        seed: of the draws; the held-out ones do not depend on train_games.

    Raises:
        ValueError: a setting is out of range.
    """
    for name, value in (
        ("sequence_length", sequence_length), ("train_games", train_games), ("heldout_games", heldout_games)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rules = Othello(size)
    dtype = token_dtype(rules.vocab_size)

    def stream(games: int, part: int) -> tuple[np.ndarray, float]:
        random = np.random.default_rng([seed, part])
        parts = [rules.draw(min(AT_ONCE, games - n), sequence_length, random) for n in range(0, games, AT_ONCE)]
        return np.concatenate([tokens.astype(dtype) for tokens, _ in parts], axis=None), math.fsum(n for _, n in parts)

    (heldout, entropy), (train, _) = stream(heldout_games, 0), stream(train_games, 1)
    digest = hashlib.sha256(f"{size} {sequence_length} ".encode() + heldout.tobytes() + b" " + train.tobytes())
    names = [f"{chr(ord('a') + s % size)}{1 + s // size} ".encode() for s in range(rules.squares)]
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=len(heldout),
        vocab_size=rules.vocab_size,
        eot=EOT,
        digest=digest.hexdigest(),
        name=f"othello/{size}x{size}",
        pieces=[b"", *names, b"pass "],
        heldout_entropy=entropy,
    )
