"""States that the mixers of this project keep while they decode.

Shape letters: B sequences, T new tokens, S tokens that can be seen, G key-value heads, D dimensions, W taps, C
    channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from archs.contracts import State


@dataclass(frozen=True, eq=False)
class KVCache(State):
    """Keys and values of the tokens that later ones can see, in buffers that grow by doubling.

    k, v: [B, capacity, G, D], of which the first `held` tokens are filled; in the dtype of the first that they hold.
    window: tokens that a query sees, itself included, or None for all; older ones are dropped.
    """

    k: Tensor
    v: Tensor
    window: int | None = None
    length: int = 0
    held: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KVCache]:
        """Add k, v [B, T, G, D]: what the new tokens may see, [B, S, G, D] with the new ones last, and the cache after
        them, which shares its buffers with this one."""
        length = self.length + k.shape[1]
        if self.window is not None:
            k, v = (torch.cat([old[:, : self.held].to(new.dtype), new], 1) for old, new in ((self.k, k), (self.v, v)))
            # The next token sees itself and window - 1 before it.
            held = min(k.shape[1], self.window - 1)
            kept_k, kept_v = (x[:, x.shape[1] - held :].clone() for x in (k, v))
            return k, v, replace(self, k=kept_k, v=kept_v, length=length, held=held)
        end, capacity = self.held + k.shape[1], self.k.shape[1]
        buffer_k, buffer_v = self.k, self.v
        if end > capacity:
            buffers = ((self.k, k), (self.v, v))
            buffer_k, buffer_v = (self._grown(old, new, max(end, 2 * capacity)) for old, new in buffers)
        buffer_k[:, self.held : end], buffer_v[:, self.held : end] = k, v
        after = replace(self, k=buffer_k, v=buffer_v, length=length, held=end)
        return buffer_k[:, :end], buffer_v[:, :end], after

    def _grown(self, old: Tensor, new: Tensor, capacity: int) -> Tensor:
        """Return a buffer [B, capacity, G, D] that begins with what the old one holds. In memory its heads stand one
        after the other, so that a head's tokens are read in one piece."""
        B, _, G, D = new.shape
        grown = (old if self.held else new).new_empty(B, G, capacity, D).transpose(1, 2)
        grown[:, : self.held] = old[:, : self.held]
        return grown

    @property
    def nbytes(self) -> int:
        """Bytes in use; the spare room of the buffers is not counted."""
        return self.k[:, : self.held].nbytes + self.v[:, : self.held].nbytes

    def repeat(self, copies: int) -> Self:
        k, v = (x[:, : self.held].repeat_interleave(copies, dim=0) for x in (self.k, self.v))
        return replace(self, k=k, v=v)


@dataclass(frozen=True, eq=False)
class RecurrentState(State):
    """A state of fixed size.

    conv: [B, W - 1, C], the last inputs of the short convolution.
    memory: one matrix per head, float32 or wider, or None where there is none.
    """

    conv: Tensor
    memory: Tensor | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + (0 if self.memory is None else self.memory.nbytes)

    def repeat(self, copies: int) -> Self:
        conv, memory = (x if x is None else x.repeat_interleave(copies, dim=0) for x in (self.conv, self.memory))
        return replace(self, conv=conv, memory=memory)


@dataclass(frozen=True, eq=False)
class JointState(State):
    """The states of several parts of one mixer, in their order."""

    parts: tuple[State, ...]

    @property
    def length(self) -> int:
        return self.parts[0].length

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def repeat(self, copies: int) -> Self:
        return replace(self, parts=tuple(part.repeat(copies) for part in self.parts))
