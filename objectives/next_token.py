"""Next-token prediction: the exact likelihood by the chain rule."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import CAUSAL
from objectives.likelihood import Likelihood, mean_nats, nats_at
from objectives.sampling import GAP, Draw, Samples


class NextToken:
    """-log p(x) = sum_t -log p(x_t | x_<t), every window scored from its first token on.

    Args:
        vocab_size: number of token ids of the data.
        eot: id of the end-of-text token, which also stands in front of every window.
        ahead: number of further tokens that training also predicts at each position (multi-token prediction,
            DeepSeek-V3, arXiv 2412.19437, section 2.2). They cost FLOPs, which are counted, and are not part of the
            likelihood.
        ahead_weight: of the mean of their losses beside the loss itself; 0.3 in DeepSeek-V3.

    Raises:
        ValueError: for an `ahead` below 0.
    """

    visibility = CAUSAL

    def __init__(self, vocab_size: int, eot: int, ahead: int = 0, ahead_weight: float = 0.3):
        if ahead < 0:
            raise ValueError(f"ahead={ahead} must be 0 (no further token) or above")
        self.vocab_size = self.model_vocab_size = vocab_size
        self.model_options = {"ahead": ahead} if ahead else {}
        self.eot, self.ahead, self.ahead_weight = eot, ahead, ahead_weight

    def flops(self, model: LanguageModel, T: int, scored: float = 1.0) -> float:
        """Forward FLOPs of training on a sequence of T tokens, `scored` of which are answers; the head runs on these,
        and for further tokens on all."""
        return model.flops(T, CAUSAL, scored) + model.ahead_flops(T)

    def answer_logits(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where answers_BT is true, each from the tokens before it."""
        return model.logits(self._hidden(model, tokens_BT)[answers_BT])

    def _hidden(self, model: LanguageModel, tokens_BT: Tensor) -> Tensor:
        return model.hidden(F.pad(tokens_BT[:, :-1], (1, 0), value=self.eot), CAUSAL)

    def _nats(self, model: LanguageModel, hidden_BTD: Tensor, tokens_BT: Tensor, answers_BT: Tensor | None) -> Tensor:
        if answers_BT is not None:
            return nats_at(model.logits(hidden_BTD[answers_BT]), tokens_BT, answers_BT)
        logits_BTV = model.logits(hidden_BTD)
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """Mean nats a token, or an answer where these are marked, and the weighted loss of the further tokens: a scalar
        with gradients. The generator is not used."""
        hidden_BTD = self._hidden(model, tokens_BT)
        loss = mean_nats(self._nats(model, hidden_BTD, tokens_BT, answers_BT), answers_BT)
        if not self.ahead:
            return loss
        further = []
        for k, ahead_BTD in enumerate(model.look_ahead(hidden_BTD, tokens_BT), 1):
            nats_BT = self._nats(model, ahead_BTD, tokens_BT[:, k:], None)
            if answers_BT is not None:
                nats_BT = nats_BT * answers_BT[:, k:]
            further.append(mean_nats(nats_BT, None if answers_BT is None else answers_BT[:, k:]))
        return loss + self.ahead_weight * torch.stack(further).mean()

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """Exact -log p of each sequence, or of its answers given what stands before each. The generator is not used."""
        nats_BT = self._nats(model, self._hidden(model, tokens_BT), tokens_BT, answers_BT)
        return Likelihood(nats_BT.double().sum(1), variance=0.0, exact=True)

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        draw: Draw = Draw(),
        sampler: None = None,
    ) -> Samples:
        """Continue prompt [B, P] (P may be 0) to `length` tokens, one at a time from the cached state.

        Raises:
            ValueError: for a sampler, a prompt with gaps, or one that is no shorter than the length.
        """
        B, P = prompt_BT.shape
        if sampler is not None:
            raise ValueError(f"next_token makes one token after the other: leave sampler={sampler} out")
        if (prompt_BT == GAP).any():
            raise ValueError("next_token cannot fill gaps, only continue: choose a diffusion objective for them")
        if P >= length:
            raise ValueError(f"the prompt has {P} tokens already: ask for a length above that, not {length}")
        tokens = F.pad(prompt_BT, (1, 0), value=self.eot)
        logits_BTV, states = model.prefill(tokens)
        logits_BV, new = logits_BTV[:, -1], []
        for position in range(P, length):
            new.append(draw(logits_BV, generator))
            if position + 1 < length:
                logits_BV, states = model.step(new[-1], states)
        return Samples(torch.cat([prompt_BT, torch.stack(new, 1)], dim=1), length - P, length - P)

    def sampling_flops(self, model: LanguageModel, samples: Samples) -> float:
        """FLOPs of one sequence of these samples: each token is run once from the cached state, which in all is one
        causal pass, and the head on the new ones."""
        return model.flops(samples.tokens_BT.shape[1], CAUSAL, 0.0) + samples.predictions * model.head_flops
