"""One residual block: a sequence mixer, then a channel mixer, each behind an RMSNorm."""

from torch import Tensor, nn

from archs.visibility import Visibility


class Block(nn.Module):
    def __init__(self, width: int, mixer: nn.Module, channel: nn.Module):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = mixer
        self.channel_norm = nn.RMSNorm(width)
        self.channel = channel

    def forward(self, x_BTD: Tensor, visibility: Visibility, state=None):
        """x [B, T, width] and the mixer's state (or None) -> the same."""
        y, state = self.mixer(self.mixer_norm(x_BTD), visibility, state)
        x_BTD = x_BTD + y
        return x_BTD + self.channel(self.channel_norm(x_BTD)), state

    def flops(self, T: int, visibility: Visibility) -> int:
        return self.mixer.flops(T, visibility) + self.channel.flops(T)
