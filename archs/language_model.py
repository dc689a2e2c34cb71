"""LanguageModel: embedding -> blocks -> norm -> head. Every backbone is this class with another list of mixers.

Shape letters: B sequences, T tokens, L tokens of one copy of a sequence, D model width, V token ids.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from archs.block import Block
from archs.contracts import Channel, Mixer, Part, State
from archs.parameters import Linear, Role, RoleParameter, adapter_products, linear_layers
from archs.visibility import CAUSAL, Kind, Visibility

TIME_FEATURES = 16
DEEPEST = 4096  # blocks: more take minutes to build, and come of a width with zeros too many


def depth_for(width: int) -> int:
    """The depth that follows from the width where none is given: 4 blocks for every 256 of width.

    Multiples of four keep hybrids of period four whole, and 64 of width per block is the shape of GPT-2 and its
    descendants (768 x 12, 1024 x 16). Below width 384 the depth is 4 and the width alone sets the size.
    """
    return 4 * max(1, round(width / 256))


class Ahead(nn.Module):
    """One more step into the future (multi-token prediction, DeepSeek-V3, arXiv 2412.19437, section 2.2): a block on
    what was made of the tokens up to t together with the token after them."""

    def __init__(self, width: int, block: Block, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.hidden_norm, self.token_norm = norm(width), norm(width)
        self.merge = nn.Linear(2 * width, width, bias=False)
        self.block = block

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, visibility: Visibility) -> Tensor:
        x_BTD = self.merge(torch.cat([self.hidden_norm(hidden_BTD), self.token_norm(embedded_BTD)], dim=-1))
        return self.block(x_BTD, visibility)[0]

    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens."""
        merge = self.merge.weight.numel() + adapter_products(self.merge)
        return 2 * T * merge + self.block.flops(T, CAUSAL)


class LanguageModel(nn.Module):
    """Brings token ids to logits.

    Args:
        vocab_size: number of token ids, in and out.
        width: model width, the one dial for size; heads and (through `depth_for`) depth follow it.
        pattern: blocks, repeated to fill the depth. "gated_delta+mlp" is a block of that mixer and that channel,
            "mamba2" one of a mixer alone: ["gated_delta+mlp"] * 3 + ["attention+mlp"] is a hybrid.
        mixers, channels: for each name a function of the width that builds the part.
        first: blocks in front of the repeated pattern (the dense layers of a mixture of experts).
        depth: number of blocks, or None for `depth_for(width)`.
        tied: whether the head shares the embedding's weights.
        norm: builds a norm from the width; norm_at: where a block has its norms (see `Block`).
        head_bias: whether the head has a bias.
        max_length: longest sequence, with a learned vector for each position (GPT-2); None for no such vectors.
        timed: whether the model is told a time in [0, 1] of each token (denoisers): a linear map of cosines of it, zero
            at first, is added to the token's embedding.
        ahead: number of further tokens to predict (see `Ahead`), each by one more of the pattern's last block.
        scored: whether a linear map, zero at first, gives each hidden vector a score (reward models).

    Raises:
        ValueError: for an empty pattern, a name in it that has no mixer or channel, a depth that cuts the pattern, or
            one of more than `DEEPEST` blocks.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        pattern: Sequence[str],
        mixers: Mapping[str, Callable[[int], Mixer]],
        channels: Mapping[str, Callable[[int], Channel]] = MappingProxyType({}),
        first: Sequence[str] = (),
        depth: int | None = None,
        tied: bool = False,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        norm_at: str = "pre",
        head_bias: bool = False,
        max_length: int | None = None,
        timed: bool = False,
        ahead: int = 0,
        scored: bool = False,
    ):
        super().__init__()
        depth = depth_for(width) if depth is None else depth
        parts = [name.partition("+") for name in (*first, *pattern)]
        if not pattern or any(m not in mixers or (plus and c not in channels) for m, plus, c in parts):
            raise ValueError(
                f"pattern {[*first, *pattern]} must have at least one block, each 'mixer' or 'mixer+channel' with a "
                f"mixer of {sorted(mixers)} and a channel of {sorted(channels)}"
            )
        if depth > DEEPEST:
            raise ValueError(
                f"width {width} and depth {depth}: a model has {DEEPEST} blocks at most; choose a smaller width, or a "
                "depth for it"
            )
        rest = depth - len(first)
        if rest < 1 or rest % len(pattern):
            raise ValueError(
                f"depth {depth} is not {len(first)} first blocks and a multiple of the {len(pattern)} blocks of "
                f"pattern {list(pattern)}"
            )
        self.width, self.depth, self.tied, self.max_length = width, depth, tied, max_length
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width) if max_length is not None else None
        self.time = nn.Linear(TIME_FEATURES, width, bias=False) if timed else None

        def block(mixer: str, plus: str, channel: str) -> Block:
            return Block(width, mixers[mixer](width), channels[channel](width) if plus else None, norm, norm_at)

        parts = parts[: len(first)] + parts[len(first) :] * (rest // len(pattern))
        self.blocks = cast(Sequence[Block], nn.ModuleList(block(*part) for part in parts))
        steps = nn.ModuleList(Ahead(width, block(*parts[-1]), norm) for _ in range(ahead))
        self.ahead = cast(Sequence[Ahead], steps)
        self.norm = norm(width)
        self.head = nn.Linear(width, vocab_size, bias=head_bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.score = nn.Linear(width, 1, bias=False) if scored else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embedding entries of order one; matrices 1 / sqrt(fan-in); what is added to the residual stream smaller
        with depth (GPT-2); biases and an untied head at zero, so that the first loss is log(vocab_size)."""
        nn.init.normal_(self.embedding.weight)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.1)
        if self.time is not None:
            nn.init.zeros_(self.time.weight)
        residual = {id(layer) for part in self._parts() for layer in part.residual_projections()}
        for layer in self._inner_layers():
            std = layer.in_features**-0.5
            nn.init.normal_(layer.weight, std=std / (2 * self.depth) ** 0.5 if id(layer) in residual else std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        if self.score is not None:
            nn.init.zeros_(self.score.weight)
        if not self.tied:
            nn.init.zeros_(self.head.weight)

    def _parts(self) -> Iterator[Part]:
        return (module for module in self.modules() if isinstance(module, Part))

    def _inner_layers(self) -> Iterator[Linear]:
        """The linear layers inside the blocks, those that look ahead included."""
        for part in (*self.blocks, *self.ahead):
            yield from linear_layers(part)

    def roles(self) -> list[RoleParameter]:
        """Every parameter that is trained, with its name, role and fan-in, in the order of `parameters()`; a tied head
        is an embedding, and an adapter two matrices."""
        roles = {id(layer.weight): (Role.MATRIX, layer.in_features) for layer in self._inner_layers()}
        roles[id(self.head.weight)] = Role.HEAD, self.width
        if self.score is not None:
            roles[id(self.score.weight)] = Role.HEAD, self.width
        for layer in (self.embedding, self.positions, self.time):
            if layer is not None:
                roles[id(layer.weight)] = Role.EMBEDDING, 1
        trained = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        return [RoleParameter(name, p, *roles.get(id(p), (Role.VECTOR, 1))) for name, p in trained]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The losses of the parts' own in the last training forward (balance of experts, indexers), by name, each
        summed over the blocks and with its coefficient."""
        losses: dict[str, Tensor] = {}
        for part in self._parts():
            for name, loss in part.auxiliary_losses().items():
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

    def after_step(self) -> None:
        """Let the parts that change a buffer after each optimiser step do so (balance without auxiliary loss)."""
        for part in self._parts():
            part.after_step()

    def telemetry(self) -> dict[str, float]:
        """Figures of the last training forward that parts report, each the mean over the parts that have it."""
        figures = defaultdict(list)
        for part in self._parts():
            for name, value in part.telemetry().items():
                figures[name].append(value)
        return {name: sum(values) / len(values) for name, values in figures.items()}

    @property
    def visibilities(self) -> frozenset[Kind]:
        """The kinds of visibility that every mixer of the model can do."""
        return frozenset.intersection(*(block.mixer.visibilities for block in self.blocks))

    def empty_states(self, batch: int) -> list[State]:
        """The states of `batch` sequences before their first token, one per block."""
        return [block.mixer.empty_state(batch) for block in self.blocks]

    def hidden(self, tokens_BT: Tensor, visibility: Visibility = CAUSAL, time: Tensor | None = None) -> Tensor:
        """Normalised hidden vectors [B, T, D] of tokens. `time`: [B, T] or [B, 1], for a model that is timed and only
        for such.

        Raises:
            ValueError: where positions are learned and the tokens go beyond the last of them, or a time is missing or
                not wanted.
        """
        x_BTD, visibility = self._embed(tokens_BT, visibility, 0, time), visibility.for_one_pass()
        for block in self.blocks:
            x_BTD, _ = block(x_BTD, visibility)
        return self.norm(x_BTD)

    def extend(
        self,
        tokens_BT: Tensor,
        states: list[State],
        visibility: Visibility = CAUSAL,
        time: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Hidden vectors of tokens that continue the states, as `hidden` gives them, and the states after them; see
        `State` for what becomes of the states before."""
        x_BTD, after = self._embed(tokens_BT, visibility, states[0].length, time), []
        visibility = visibility.for_one_pass()
        for block, state in zip(self.blocks, states, strict=True):
            x_BTD, state = block(x_BTD, visibility, state)
            after.append(state)
        return self.norm(x_BTD), after

    def _embed(self, tokens_BT: Tensor, visibility: Visibility, start: int, time: Tensor | None) -> Tensor:
        if (time is None) != (self.time is None):
            raise ValueError(
                f"the model is {'not ' if self.time is None else ''}timed: build it with the objective's options"
            )
        x_BTD = self.embedding(tokens_BT)
        if self.positions is not None and self.max_length is not None:
            end = start + tokens_BT.shape[1] // visibility.copies
            if end > self.max_length:
                raise ValueError(f"{end} tokens are beyond the {self.max_length} positions learned: raise max_length")
            x_BTD = x_BTD + self.positions(visibility.positions(tokens_BT.shape[1], start, tokens_BT.device))
        if self.time is not None and time is not None:
            waves = math.pi * torch.arange(1, TIME_FEATURES + 1, device=x_BTD.device)
            time_BT = time.float().expand(tokens_BT.shape)
            x_BTD = x_BTD + self.time((time_BT[..., None] * waves).cos().to(x_BTD.dtype))
        return x_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden vectors [..., D]. A tied head reads embeddings of order one, so its logits are
        divided by the width (muP's output multiplier)."""
        return self.head(self._before_head(hidden))

    def head_product(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the factors of the logits of hidden vectors [..., D]: vectors [..., D], the head's matrix [V, D] and
        its bias."""
        return self._before_head(hidden), self.head.weight, self.head.bias

    def _before_head(self, hidden: Tensor) -> Tensor:
        return hidden / self.width if self.tied else hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores [...] of hidden vectors [..., D].

        Raises:
            ValueError: for a model without them.
        """
        if self.score is None:
            raise ValueError("the model has no scores: build it with the objective's options")
        return self.score(hidden)[..., 0]

    def forward(self, tokens_BT: Tensor, visibility: Visibility = CAUSAL) -> Tensor:
        """Logits [B, T, V] of token ids."""
        return self.logits(self.hidden(tokens_BT, visibility))

    def look_ahead(self, hidden_BTD: Tensor, tokens_BT: Tensor, visibility: Visibility) -> Iterator[Tensor]:
        """Hidden vectors for the tokens still further on. hidden: of the inputs; tokens [B, T]: the token behind each
        input, which hidden predicts. The k-th item, [B, T - k, D], predicts tokens[:, k:]; where documents are packed,
        what it says of another document than it has read is to be left out."""
        x_BTD = hidden_BTD
        for k, ahead in enumerate(self.ahead, 1):
            within = visibility.packed(None if visibility.starts_BL is None else visibility.starts_BL[:, :-k])
            x_BTD = ahead(x_BTD[:, :-1], self.embedding(tokens_BT[:, k - 1 : -1]), within)
            yield self.norm(x_BTD)

    def flops(self, T: int, visibility: Visibility, predicted: float = 1.0) -> float:
        """Forward FLOPs of one sequence of T tokens, the head run on a fraction `predicted` of them.

        Matrix products, convolutions and triangular solves are counted; lookups, norms and activations are not.
        """
        time = 2 * T * self.time.weight.numel() if self.time is not None else 0
        return sum(block.flops(T, visibility) for block in self.blocks) + time + T * predicted * self.head_flops

    @property
    def head_flops(self) -> int:
        """Forward FLOPs of the head on one token."""
        return 2 * self.head.weight.numel()

    def ahead_flops(self, T: int) -> int:
        """Forward FLOPs of one sequence in `look_ahead` and the head behind it."""
        return sum(ahead.flops(T - k) + (T - k) * self.head_flops for k, ahead in enumerate(self.ahead, 1) if k < T)
