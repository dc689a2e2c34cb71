"""One residual block: a sequence mixer, then (mostly) a channel mixer, each with its norms.

Shape letters: B sequences, T tokens, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from archs.contracts import Channel, Mixer, State
from archs.parameters import adapter_products
from archs.visibility import Visibility

NORM_AT = ("pre", "post", "both")


class Block(nn.Module):
    """x + mixer(x), then x + channel(x), with a norm on what goes in ("pre"), on what comes out before it is added
    ("post", as in OLMo 2) or on both ("both", as in Gemma 3).

    Args:
        width: model width.
        mixer, channel: the two parts; a channel of None leaves the second out, as in Mamba.
        norm: builds a norm from the width.
        norm_at: "pre", "post" or "both".

    Attributes:
        recompute: whether training keeps no more than what goes in, and runs the block again in the backward pass.

    Raises:
        ValueError: for another norm_at.
    """

    recompute = False

    def __init__(
        self,
        width: int,
        mixer: Mixer,
        channel: Channel | None,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        norm_at: str = "pre",
    ):
        super().__init__()
        if norm_at not in NORM_AT:
            raise ValueError(f"norm_at={norm_at!r} must be one of {', '.join(NORM_AT)}")
        before, after = norm_at != "post", norm_at != "pre"
        self.mixer_norm = norm(width) if before else nn.Identity()
        self.mixer = mixer
        self.mixer_post_norm = norm(width) if after else nn.Identity()
        self.channel = channel
        if channel is not None:
            self.channel_norm = norm(width) if before else nn.Identity()
            self.channel_post_norm = norm(width) if after else nn.Identity()

    def forward(self, x_BTD: Tensor, visibility: Visibility, state: State | None = None) -> tuple[Tensor, State | None]:
        """x after the block, and the mixer's state after x."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._mix, x_BTD, visibility, state, use_reentrant=False)
        return self._mix(x_BTD, visibility, state)

    def _mix(self, x_BTD: Tensor, visibility: Visibility, state: State | None) -> tuple[Tensor, State | None]:
        y, state = self.mixer(self.mixer_norm(x_BTD), visibility, state)
        x_BTD = x_BTD + self.mixer_post_norm(y)
        if self.channel is not None:
            x_BTD = x_BTD + self.channel_post_norm(self.channel(self.channel_norm(x_BTD)))
        return x_BTD, state

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence, those of adapters included."""
        parts = self.mixer.flops(T, visibility) + (self.channel.flops(T) if self.channel is not None else 0)
        return parts + 2 * T * adapter_products(self)
