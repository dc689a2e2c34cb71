"""LanguageModel: embedding -> blocks -> norm -> head. Every backbone is this class with another list of mixers."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from archs.block import Block
from archs.visibility import CAUSAL, Visibility


def depth_for(width: int) -> int:
    """The depth that follows from the width where none is given: 4 blocks for every 256 of width.

    Multiples of four keep hybrids of period four whole, and 64 of width a block is the shape of GPT-2 and its
    descendants (768 x 12, 1024 x 16). Below width 384 the depth is 4 and the width alone sets the size.
    """
    return 4 * max(1, round(width / 256))


class LanguageModel(nn.Module):
    """Token ids to logits.

    Args:
        vocab_size: number of token ids, in and out.
        width: model width, the one dial for size; heads and (through `depth_for`) depth follow it.
        pattern: names of mixers, repeated to fill the depth: ["gated_delta"] * 3 + ["attention"] is a hybrid.
        mixers: for each name a function of the width that builds the mixer.
        channel: a function of the width that builds the channel mixer.
        depth: number of blocks, or None for `depth_for(width)`.
        tied: whether the head shares the embedding's weights.

    Raises:
        ValueError: for an empty pattern, a name in it that has no mixer, or a depth that cuts the pattern.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Callable[[int], nn.Module]],
        channel: Callable[[int], nn.Module],
        depth: int | None = None,
        tied: bool = False,
    ):
        super().__init__()
        depth = depth_for(width) if depth is None else depth
        unknown = sorted(set(pattern) - set(mixers))
        if unknown or not pattern:
            raise ValueError(f"pattern {list(pattern)} may name only the mixers {sorted(mixers)}, and at least one")
        if depth < 1 or depth % len(pattern):
            raise ValueError(f"depth {depth} is not a multiple of the {len(pattern)} blocks of pattern {list(pattern)}")
        self.width, self.depth, self.tied = width, depth, tied
        self.embedding = nn.Embedding(vocab_size, width)
        names = list(pattern) * (depth // len(pattern))
        self.blocks = nn.ModuleList(Block(width, mixers[name](width), channel(width)) for name in names)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embedding entries of order one; matrices 1 / sqrt(fan-in); what is added to the residual stream smaller
        with depth (GPT-2); an untied head at zero, so that the first loss is log(vocab_size)."""
        nn.init.normal_(self.embedding.weight)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.normal_(module.weight, std=std / (2 * self.depth) ** 0.5 if name.endswith("out_proj") else std)
        if not self.tied:
            nn.init.zeros_(self.head.weight)

    @property
    def visibilities(self) -> frozenset[Visibility]:
        """The visibilities that every mixer of the model can do."""
        return frozenset.intersection(*(block.mixer.visibilities for block in self.blocks))

    def hidden(self, tokens_BT: Tensor, visibility: Visibility, states: list | None = None) -> Tensor:
        """Token ids [B, T] -> normalised hidden vectors [B, T, width]; `states` is advanced in place."""
        x_BTD = self.embedding(tokens_BT)
        for i, block in enumerate(self.blocks):
            x_BTD, state = block(x_BTD, visibility, None if states is None else states[i])
            if states is not None:
                states[i] = state
        return self.norm(x_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [..., width] -> logits [..., vocab_size]. A tied head reads embeddings of order one, so its
        logits are divided by the width (muP's output multiplier)."""
        return self.head(hidden / self.width if self.tied else hidden)

    def forward(self, tokens_BT: Tensor, visibility: Visibility = CAUSAL) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab_size]."""
        return self.logits(self.hidden(tokens_BT, visibility))

    def prefill(self, tokens_BT: Tensor, states: list | None = None) -> tuple[Tensor, list]:
        """Logits [B, T, vocab_size] of tokens that continue `states` (None: from nothing), and the states after them."""
        states = [block.mixer.empty_state(len(tokens_BT)) for block in self.blocks] if states is None else states
        return self.logits(self.hidden(tokens_BT, CAUSAL, states)), states

    def step(self, tokens_B: Tensor, states: list) -> tuple[Tensor, list]:
        """One token [B] -> logits [B, vocab_size] of the next, and the states after it."""
        logits_BTV, states = self.prefill(tokens_B[:, None], states)
        return logits_BTV[:, 0], states

    def flops(self, T: int, visibility: Visibility, predicted: float = 1.0) -> float:
        """Forward FLOPs of one sequence of T tokens, the head run on a share `predicted` of them.

        Matrix products, convolutions and triangular solves are counted; lookups, norms and activations are not.
        """
        head = 2 * T * self.head.weight.numel() * predicted
        return sum(block.flops(T, visibility) for block in self.blocks) + head
