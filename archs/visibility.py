"""Which tokens a token may look at."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Visibility(Enum):
    """What an objective asks for and a mixer can or cannot do. The first two are whole visibilities; the third is the
    kind of every `BlockCausal`."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    BLOCK_CAUSAL = "block-causal"

    @property
    def kind(self) -> "Visibility":
        return self

    @property
    def copies(self) -> int:
        """How many times the sequence stands in the input, side by side, each from position 0."""
        return 1

    def pairs(self, T: int, window: int | None = None) -> int:
        """Number of (query, key) pairs in a sequence of T tokens: what attention has to compute. A window is the
        number of tokens that a query sees, itself included, in each direction that it sees at all."""
        unseen = max(0, T - window) if window is not None else 0
        causal = T * (T + 1) // 2 - unseen * (unseen + 1) // 2
        return causal if self is Visibility.CAUSAL else 2 * causal - T


CAUSAL, BIDIRECTIONAL = Visibility.CAUSAL, Visibility.BIDIRECTIONAL


@dataclass(frozen=True)
class BlockCausal:
    """Of an input that holds a sequence twice, noised and then clean, cut into blocks: a noised token sees the noised
    tokens of its own block and the clean ones of the blocks before; a clean token the clean ones of the blocks up to its
    own (Arriola et al., arXiv 2503.09573, section 3.2). A last block may be shorter.

    Args:
        size: tokens in a block.
    """

    size: int
    kind = Visibility.BLOCK_CAUSAL
    copies = 2

    def visible(self, T: int, device: torch.device | None = None) -> Tensor:
        """True at the pairs seen, [T, T] of queries and keys; T tokens, of which the first half are the noised ones."""
        block_L = torch.arange(T // 2, device=device) // self.size
        query, key = block_L[:, None], block_L
        noised = torch.cat([query == key, query > key], dim=1)
        clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=1)
        return torch.cat([noised, clean])

    def pairs(self, T: int, window: int | None = None) -> int:
        """Number of (query, key) pairs among T tokens, both halves counted: (T / 2) (T / 2 + size) of whole blocks."""
        blocks, rest = divmod(T // 2, self.size)
        # A token of either half sees all blocks before its own and, in one of the halves, its own.
        return 2 * (self.size**2 * blocks * (blocks + 1) // 2 + rest * (blocks * self.size + rest))
