"""What a mixer keeps between tokens when it decodes. A mixer owns its state; the model holds one a block."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the tokens that later ones can see, in buffers that grow by doubling.

    k, v: [B, capacity, KV heads, D], of which the first `held` tokens are filled.
    window: tokens that a query sees, itself included, or None for all; older ones are dropped.
    length: tokens seen so far, the position of the next one.
    """

    k: Tensor
    v: Tensor
    window: int | None = None
    length: int = 0
    held: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [B, T, KV heads, D]; return what the new tokens may see, [B, S, KV heads, D], the new ones last."""
        T = k.shape[1]
        self.length += T
        if self.window is not None:
            k, v = (torch.cat([old[:, : self.held], new], 1) for old, new in ((self.k, k), (self.v, v)))
            # The next token sees itself and window - 1 before it.
            self.held = min(k.shape[1], self.window - 1)
            self.k, self.v = (x[:, x.shape[1] - self.held :].clone() for x in (k, v))
            return k, v
        end, capacity = self.held + T, self.k.shape[1]
        if end > capacity:
            room = max(end, 2 * capacity) - capacity
            self.k, self.v = (torch.cat([x, x.new_empty(x.shape[0], room, *x.shape[2:])], 1) for x in (self.k, self.v))
        self.k[:, self.held : end] = k
        self.v[:, self.held : end] = v
        self.held = end
        return self.k[:, :end], self.v[:, :end]

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens, as if they had not been appended; not where a window has dropped older ones."""
        self.length -= tokens
        self.held -= tokens

    @property
    def nbytes(self) -> int:
        """Bytes in use; the spare room of the buffers is not counted."""
        return self.k[:, : self.held].nbytes + self.v[:, : self.held].nbytes


@dataclass
class RecurrentState:
    """A state of fixed size: the last inputs of the short convolution and, where there is one, the matrix memory."""

    conv: Tensor  # [B, W - 1, C]
    memory: Tensor | None = None  # one matrix a head, float32: [B, HV, K, V] of a delta rule, [B, H, P, N] of Mamba-2

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + (0 if self.memory is None else self.memory.nbytes)


@dataclass
class States:
    """The states of several parts of one mixer, in their order."""

    states: list

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    @property
    def length(self) -> int:
        """Tokens seen so far, by any part that knows; without one there is no such attribute."""
        known = [state.length for state in self.states if hasattr(state, "length")]
        if not known:
            raise AttributeError("no part of this state knows how many tokens it has seen")
        return max(known)
