"""Filling block after block from the cached state of those before, which is exact for block diffusion.

Shape letters: B sequences, T tokens, S tokens of one block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from archs.contracts import State
from objectives.contracts import Request, Sampler, Samples
from objectives.decoding.unmasking import Canvas, MaskedDenoiser, Unmasking


class BlockDenoiser(Protocol):
    """The model that is asked. mask: the id at masked positions; block_size: tokens per block, the last may be
    shorter."""

    @property
    def mask(self) -> int: ...
    @property
    def block_size(self) -> int: ...

    def empty_states(self, batch: int) -> list[State]:
        """The states before the first block."""
        ...

    def within(self, states: list[State]) -> MaskedDenoiser:
        """Return what denoises the tokens [B, S] of the block behind these states."""
        ...

    def after(self, tokens_BS: torch.Tensor, states: list[State]) -> list[State]:
        """The states after a block that has been filled."""
        ...


@dataclass(frozen=True)
class CachedBlocks(Sampler):
    """Fills each block by another sampler from the states of the blocks before, and then runs what has been filled once
    more, clean, into the states."""

    sampler: Unmasking

    @property
    def blind(self) -> bool:
        return self.sampler.blind

    def __call__(self, denoiser: BlockDenoiser, request: Request) -> Samples:
        whole = Canvas.of(request, denoiser.mask)
        B, T = whole.tokens_BT.shape
        states = denoiser.empty_states(B)
        for start in range(0, T, denoiser.block_size):
            here = slice(start, min(start + denoiser.block_size, T))
            block = whole.part(here)
            if block.masked_BT.any():
                self.sampler.fill(denoiser.within(states), block, block.masked_BT)
                whole.tokens_BT[:, here], whole.log_probs_BT[:, here] = block.tokens_BT, block.log_probs_BT
                whole.order_BT[:, here] = block.order_BT
                whole.passes, whole.predictions = whole.passes + block.passes, whole.predictions + block.predictions
            if here.stop < T:
                states = denoiser.after(block.tokens_BT, states)
                whole.passes += B
        return whole.samples(request.stop)
