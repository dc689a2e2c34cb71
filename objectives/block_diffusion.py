"""Block diffusion: autoregressive over blocks of tokens, masked diffusion within each.

Shape letters: B sequences, T tokens, D model width, V token ids of the data, N positions picked out of a batch, M
blocks of S tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from archs.contracts import State
from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL, block_causal
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Sampler, Samples
from objectives.decoding.cached_blocks import CachedBlocks
from objectives.decoding.unmasking import Ancestral, MaskedDenoiser, Unmasking
from objectives.likelihood import Likelihood, bound_by, check_draws, nats_at, summed_nats
from objectives.noise import mask_some


class BlockDiffusion(Objective):
    """-log p(x) <= sum over blocks b of the bound of masked diffusion of x_b given the blocks before it (BD3-LM,
    Arriola et al., arXiv 2503.09573, equation 7).

    Training runs a sequence noised and clean side by side in one pass (see `Visibility`): all blocks learn at once, and
    the input is twice as long. Each block draws its own number of masked tokens, with the fraction of noise integrated
    out (`mask_some`), so blocks of one token are always masked and the objective is autoregression; a block of the
    whole length is masked diffusion. The mask token's column is left out of the softmax.

    Args:
        vocab_size: number of token ids of the data; the mask token is one more.
        eot: not used; every objective is built with the same arguments.
        block_size: tokens in a block; it must divide the length of training sequences. In what is shorter than a
            sequence, a held-out rest or a packed document, the last block may be shorter too.
        timed: whether the model is told the fraction of noise of each block.
        evaluation_draws: independent draws of masks for `evaluate`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a block_size below 1.
    """

    samplers = (Unmasking, CachedBlocks)

    def __init__(self, vocab_size: int, eot: int, block_size: int, timed: bool = False, evaluation_draws: int = 2):
        check_draws(evaluation_draws)
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1 token")
        self.vocab_size, self.mask = vocab_size, vocab_size
        self.model_vocab_size = vocab_size + 1
        self.model_options = {"timed": True} if timed else {}
        self.block_size, self.timed, self.evaluation_draws = block_size, timed, evaluation_draws
        self.visibility = block_causal(block_size)

    def check(self, model: LanguageModel, sequence_length: int) -> None:
        super().check(model, sequence_length)
        if sequence_length % self.block_size:
            raise ValueError(
                f"block_size={self.block_size} does not divide sequence_length={sequence_length}: choose one that does"
            )

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: the blocks of the model run 2 T tokens, the head the masked ones."""
        blocks, rest = divmod(T, self.block_size)
        # The mean of k uniform on 1 .. size is (size + 1) / 2.
        masked = blocks * (self.block_size + 1) / 2 + (rest + 1) / 2 * (rest > 0)
        return model.flops(2 * T, self.visibility, counted * masked / T / 2)

    def noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """As in `Objective`, of each token: whether it is masked, the weight of its block and the block's fraction of
        noise, [B, T]."""
        B, T = batch.tokens_BT.shape
        place_BT = self.visibility.packed(batch.starts_BT).positions(2 * T)[..., :T].expand(B, T) % self.block_size
        block_BT = (place_BT == 0).flatten().cumsum(0).view(B, T) - 1
        noisable_MS = torch.zeros(int(block_BT[-1, -1]) + 1, self.block_size, dtype=torch.bool)
        noisable_MS[block_BT, place_BT] = batch.counted_BT.cpu()
        masked_MS, weight_M, p_M = mask_some(noisable_MS, generator)
        device = batch.tokens_BT.device
        masked_BT, weight_BT, p_BT = masked_MS[block_BT, place_BT], weight_M[block_BT], p_M[block_BT]
        return {"masked": masked_BT.to(device), "weight": weight_BT.to(device), "fraction": p_BT.to(device)}

    def _hidden(self, model: Model, batch: Batch, masked_BT: Tensor, p_BT: Tensor | None) -> Tensor:
        """Hidden vectors [B, T, D] where these tokens are masked, from the unmasked tokens of their block and the clean
        blocks before."""
        noised_BT = batch.tokens_BT.masked_fill(masked_BT, self.mask)
        both = torch.cat([noised_BT, batch.tokens_BT], dim=1)
        time = {}
        if self.timed and p_BT is not None:
            time = {"time": torch.cat([p_BT, torch.zeros_like(p_BT)], dim=1)}
        return model.hidden(both, self.visibility.packed(batch.starts_BT), **time)[:, : masked_BT.shape[1]]

    def _logits(self, model: Model, batch: Batch, masked_BT: Tensor, p_BT: Tensor | None) -> Tensor:
        """Logits [N, V] at masked positions."""
        return model.logits(self._hidden(model, batch, masked_BT, p_BT)[masked_BT])[:, : self.vocab_size]

    def _summed(
        self, model: Model, batch: Batch, noise: Mapping[str, Tensor], weights_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `summed_nats` gives of masked positions."""
        hidden_BTD = self._hidden(model, batch, noise["masked"], noise["fraction"])
        return summed_nats(model, hidden_BTD, batch.tokens_BT, weights_BT, noise["masked"], self.vocab_size)

    def masked_nats(self, model: Model, batch: Batch, masked_BT: Tensor, p_BT: Tensor | None = None) -> Tensor:
        """-log p(x_i | unmasked tokens of its block, clean blocks before) at masked positions, 0 elsewhere, [B, T].
        p_BT: the fraction of noise of each token's block, for a timed model."""
        return nats_at(self._logits(model, batch, masked_BT, p_BT), batch.tokens_BT, masked_BT)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """As in `Objective`: the tokens that count are masked together, in every block."""
        return self._logits(model, batch, batch.counted_BT, torch.ones_like(batch.weights_BT))

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        """As in `Objective`: the tokens that are masked, in every block as many as are drawn for it."""
        noise = self.noise_of(batch, generator)
        logits_NV = self._logits(model, batch, noise["masked"], noise["fraction"])
        return Predictions(logits_NV, noise["masked"], noise["weight"])

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`: a one-draw estimate of the bound."""
        noise = self.noise_of(batch, generator)
        total, _ = self._summed(model, batch, noise, noise["weight"] * batch.weights_BT)
        return total / batch.all_counted.clamp_min(1)

    @torch.no_grad()
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """As in `Objective`: the bound over the whole range of noise; with blocks of one token the likelihood
        itself."""

        def draw(generator: Generator) -> Tensor:
            noise = self.noise(batch, generator)
            _, nats_BT = self._summed(model, batch, noise, torch.ones_like(batch.weights_BT))
            return (nats_BT.double() * noise["weight"]).sum(1)

        if self.block_size == 1 and not self.timed:
            return Likelihood(draw(generator), variance=0.0, exact=True)
        return bound_by(draw, self.evaluation_draws, generator)

    def denoiser(self, model: Model) -> "Blocks":
        return Blocks(model, self.mask, self.block_size, self.vocab_size, self.timed)

    def default_sampler(self, request: Request) -> Ancestral:
        """A quarter as many steps as tokens in a block."""
        return Ancestral(-(-self.block_size // 4))

    def sample(self, model: Model, request: Request, sampler: Sampler | None = None) -> Samples:
        """As in `Objective`. What fills masked positions is taken block by block (see `CachedBlocks`)."""
        sampler = self.default_sampler(request) if sampler is None else sampler
        return super().sample(model, request, CachedBlocks(sampler) if isinstance(sampler, Unmasking) else sampler)

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        """As in `Objective`: passes over one block, which in the mean sees half of the sequence, and the head where it
        was read."""
        T = samples.tokens_BT.shape[1]
        blocks = -(-T // self.block_size)
        # A pass of the blocks one after the other costs what the clean half of a training pass does.
        one_pass = (model.flops(2 * T, self.visibility, 0.0) / 2) / blocks
        return samples.evaluations * one_pass + samples.predictions * model.head_flops


@dataclass(frozen=True)
class Blocks:
    """A model that fills block after block; see `BlockDenoiser`."""

    model: Model
    mask: int
    block_size: int
    vocab_size: int
    timed: bool

    def empty_states(self, batch: int) -> list[State]:
        return self.model.empty_states(batch)

    def within(self, states: list[State]) -> MaskedDenoiser:
        return OneBlock(self.model, self.mask, self.vocab_size, self.timed, states)

    def after(self, tokens_BS: Tensor, states: list[State]) -> list[State]:
        time = {"time": torch.zeros_like(tokens_BS)} if self.timed else {}
        return self.model.extend(tokens_BS, states, BIDIRECTIONAL, **time)[1]


@dataclass(frozen=True)
class OneBlock:
    """A model that runs one block behind the states of those before; see `MaskedDenoiser`."""

    model: Model
    mask: int
    vocab_size: int
    timed: bool
    states: list[State]

    def __call__(self, tokens_BT: Tensor, where_BT: Tensor, noised_B: Tensor) -> Tensor:
        time = {"time": noised_B[:, None]} if self.timed else {}
        hidden_BTD, _ = self.model.extend(tokens_BT, self.states, BIDIRECTIONAL, **time)
        return self.model.logits(hidden_BTD[where_BT])[:, : self.vocab_size]
