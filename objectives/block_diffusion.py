"""Block diffusion: autoregressive over blocks of tokens, masked diffusion within each."""

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL, BlockCausal
from objectives.likelihood import Likelihood, bound_by, check_draws, everywhere, mean_nats, nats_at
from objectives.noise import mask_some
from objectives.sampling import Ancestral, Draw, Sampler, Samples, gaps_of


class BlockDiffusion:
    """-log p(x) <= sum over blocks b of the bound of masked diffusion of x_b given the blocks before it (BD3-LM, Arriola
    et al., arXiv 2503.09573, equation 7).

    Training runs a sequence noised and clean side by side in one pass (see `BlockCausal`): all blocks learn at once, and
    the input is twice as long. Each block draws its own number of masked tokens, with the share of noise integrated out
    (`mask_some`), so blocks of one token are always masked and the objective is autoregression; a block of the whole
    length is masked diffusion. The mask token's column is left out of the softmax.

    Args:
        vocab_size: number of token ids of the data; the mask token is one more.
        eot: not used; every objective is built with the same arguments.
        block_size: tokens in a block; it must divide the length of training sequences. In a held-out rest that is
            shorter than a sequence, the last block may be shorter too.
        timed: whether the model is told the share of noise of each block.
        evaluation_draws: independent draws of masks for `bound`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a block_size below 1.
    """

    def __init__(self, vocab_size: int, eot: int, block_size: int, timed: bool = False, evaluation_draws: int = 2):
        check_draws(evaluation_draws)
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1 token")
        self.vocab_size, self.mask = vocab_size, vocab_size
        self.model_vocab_size = vocab_size + 1
        self.model_options = {"timed": True} if timed else {}
        self.block_size, self.timed, self.evaluation_draws = block_size, timed, evaluation_draws
        self.visibility = BlockCausal(block_size)

    def flops(self, model: LanguageModel, T: int, scored: float = 1.0) -> float:
        """Forward FLOPs of training on a sequence of T tokens, `scored` of which are answers: the blocks of the model
        run 2 T tokens, the head the masked ones.

        Raises:
            ValueError: when blocks do not divide T.
        """
        if T % self.block_size:
            raise ValueError(f"block_size={self.block_size} does not divide sequence_length={T}: choose one that does")
        masked = scored * (self.block_size + 1) / 2 / self.block_size  # mean of k uniform on 1 .. block_size
        return model.flops(2 * T, self.visibility, masked / 2)

    def _noise(self, noisable_BT: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token: whether it is masked, the weight of its block and the block's share of noise."""
        B, T = noisable_BT.shape
        padded_BT = torch.nn.functional.pad(noisable_BT, (0, -T % self.block_size))
        blocks_NS = padded_BT.view(-1, self.block_size)
        masked_NS, weight_N, p_N = mask_some(blocks_NS, generator)
        spread = (x[:, None].expand(blocks_NS.shape) for x in (weight_N, p_N))
        return tuple(x.reshape(B, -1)[:, :T].to(noisable_BT.device) for x in (masked_NS, *spread))

    def masked_nats(
        self, model: LanguageModel, tokens_BT: Tensor, masked_BT: Tensor, p_BT: Tensor | None = None
    ) -> Tensor:
        """-log p(x_i | unmasked tokens of its block, clean blocks before) at masked positions, 0 elsewhere, [B, T]."""
        noised_BT = tokens_BT.masked_fill(masked_BT, self.mask)
        both = torch.cat([noised_BT, tokens_BT], dim=1)
        time = {"time": torch.cat([p_BT, torch.zeros_like(p_BT)], dim=1)} if self.timed else {}
        hidden_BTD = model.hidden(both, self.visibility, **time)[:, : tokens_BT.shape[1]]
        return nats_at(model.logits(hidden_BTD[masked_BT])[:, : self.vocab_size], tokens_BT, masked_BT)

    def answer_logits(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where answers_BT is true, these masked, from all others of their block
        and of the blocks before."""
        noised_BT = tokens_BT.masked_fill(answers_BT, self.mask)
        time = {}
        if self.timed:
            time = {"time": torch.cat([torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT)], dim=1)}
        hidden_BTD = model.hidden(torch.cat([noised_BT, tokens_BT], dim=1), self.visibility, **time)
        return model.logits(hidden_BTD[:, : tokens_BT.shape[1]][answers_BT])[:, : self.vocab_size]

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """One-draw estimate of the bound in mean nats a token, or an answer where these are marked: only they are then
        ever masked."""
        masked_BT, weight_BT, p_BT = self._noise(everywhere(tokens_BT, answers_BT), generator)
        nats_BT = self.masked_nats(model, tokens_BT, masked_BT, p_BT)
        return mean_nats(nats_BT * weight_BT.to(nats_BT), answers_BT)

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """The bound over the whole range of noise. With blocks of one token it is the likelihood itself."""
        noisable_BT = everywhere(tokens_BT, answers_BT)

        def draw(generator: Generator) -> Tensor:
            masked_BT, weight_BT, p_BT = self._noise(noisable_BT, generator)
            return (self.masked_nats(model, tokens_BT, masked_BT, p_BT).double() * weight_BT).sum(1)

        if self.block_size == 1 and not self.timed:
            return Likelihood(draw(generator), variance=0.0, exact=True)
        return bound_by(draw, self.evaluation_draws, generator)

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        draw: Draw = Draw(),
        sampler: Sampler | None = None,
    ) -> Samples:
        """Fill the gaps (-1) of a prompt [B, P] and all behind it up to `length`, block by block: `sampler` (None:
        `Ancestral` with a quarter as many steps as tokens in a block) fills one from the cached state of those before
        it, which is exact, and what has been filled is then run once more, clean, into the cache.

        Raises:
            ValueError: for a prompt without a gap that is no shorter than the length.
        """
        tokens_BT, gaps_BT = gaps_of(prompt_BT, length, self.mask)
        sampler = Ancestral(max(1, -(-self.block_size // 4))) if sampler is None else sampler
        states = [block.mixer.empty_state(len(tokens_BT)) for block in model.blocks]
        evaluations = predictions = 0.0
        for start in range(0, length, self.block_size):
            block = slice(start, min(start + self.block_size, length))
            size = block.stop - start

            def denoise(noised_BS: Tensor, where_BS: Tensor) -> Tensor:
                left_B1 = (noised_BS == self.mask).sum(1, keepdim=True)
                time = {"time": left_B1 / here_BS.sum(1, keepdim=True).clamp(min=1)} if self.timed else {}
                hidden_BSD = model.hidden(noised_BS, BIDIRECTIONAL, states, **time)
                for state in states:
                    state.rewind(size)
                return model.logits(hidden_BSD[where_BS])[:, : self.vocab_size]

            here_BS = gaps_BT[:, block]
            if here_BS.any():
                part = sampler(denoise, tokens_BT[:, block], here_BS, self.mask, draw, generator)
                tokens_BT = torch.cat([tokens_BT[:, :start], part.tokens_BT, tokens_BT[:, block.stop :]], dim=1)
                evaluations, predictions = evaluations + part.evaluations, predictions + part.predictions
            if block.stop < length:
                time = {"time": torch.zeros_like(tokens_BT[:, block])} if self.timed else {}
                model.hidden(tokens_BT[:, block], BIDIRECTIONAL, states, **time)
                evaluations += 1
        return Samples(tokens_BT, evaluations, predictions)

    def sampling_flops(self, model: LanguageModel, samples: Samples) -> float:
        """FLOPs of one sequence of these samples: passes over one block, which in the mean sees half of the sequence,
        and the head where it was read."""
        T = samples.tokens_BT.shape[1]
        blocks = -(-T // self.block_size)
        # A pass of the blocks one after the other costs what the clean half of a training pass does.
        one_pass = (model.flops(2 * T, self.visibility, 0.0) / 2) / blocks
        return samples.evaluations * one_pass + samples.predictions * model.head_flops
