"""What a mixer keeps between tokens when it decodes. A mixer owns its state; the model holds one a block."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of all tokens so far, in buffers that grow by doubling.

    k, v: [B, capacity, KV heads, D], of which the first `length` tokens are filled.
    """

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [B, T, KV heads, D]; return all keys and values so far, [B, length, KV heads, D]."""
        end = self.length + k.shape[1]
        capacity = self.k.shape[1]
        if end > capacity:
            room = max(end, 2 * capacity) - capacity
            self.k, self.v = (torch.cat([x, x.new_empty(x.shape[0], room, *x.shape[2:])], 1) for x in (self.k, self.v))
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]

    @property
    def nbytes(self) -> int:
        """Bytes in use; the spare room of the buffers is not counted."""
        return 2 * self.k[:, : self.length].nbytes


@dataclass
class RecurrentState:
    """A state of fixed size: the last inputs of the short convolution and the matrix memory."""

    conv: Tensor  # [B, W - 1, C]
    memory: Tensor  # [B, HV, K, V], float32

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.memory.nbytes
