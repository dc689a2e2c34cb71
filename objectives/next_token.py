"""Next-token prediction: the exact likelihood by the chain rule.

Shape letters: B sequences, T tokens, L tokens of one copy of a sequence, D model width, V token ids, N tokens that
count.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.contracts import State
from archs.language_model import LanguageModel
from archs.visibility import CAUSAL
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Samples
from objectives.decoding.autoregression import Autoregression
from objectives.likelihood import Likelihood, summed_nats


class NextToken(Objective):
    """-log p(x) = sum_t -log p(x_t | x_<t), every document scored from its first token on.

    Args:
        vocab_size: number of token ids of the data.
        eot: id of the end-of-text token, which also stands in front of every document.
        ahead: number of further tokens that training also predicts at each position (multi-token prediction,
            DeepSeek-V3, arXiv 2412.19437, section 2.2). They cost FLOPs, which are counted, and are not part of the
            likelihood.
        ahead_weight: of the mean of their losses beside the loss itself; 0.3 in DeepSeek-V3.

    Raises:
        ValueError: for an `ahead` below 0.
    """

    visibility = CAUSAL
    samplers = (Autoregression,)

    def __init__(self, vocab_size: int, eot: int, ahead: int = 0, ahead_weight: float = 0.3):
        if ahead < 0:
            raise ValueError(f"ahead={ahead} must be 0 (no further token) or above")
        self.vocab_size = self.model_vocab_size = vocab_size
        self.model_options = {"ahead": ahead} if ahead else {}
        self.eot, self.ahead, self.ahead_weight = eot, ahead, ahead_weight

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: the head runs on the tokens that count, and for further tokens on all."""
        return model.flops(T, CAUSAL, counted) + model.ahead_flops(T)

    def _hidden(self, model: Model, batch: Batch) -> Tensor:
        inputs_BT = F.pad(batch.tokens_BT[:, :-1], (1, 0), value=self.eot)
        if batch.starts_BT is not None:
            inputs_BT = inputs_BT.masked_fill(batch.starts_BT, self.eot)
        return model.hidden(inputs_BT, CAUSAL.packed(batch.starts_BT))

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """As in `Objective`: each from the tokens before it."""
        return model.logits(self._hidden(model, batch)[batch.counted_BT])

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        """As in `Objective`: all tokens that count, which is exact. The generator is not used."""
        return Predictions(self.logits(model, batch), batch.counted_BT, torch.ones_like(batch.weights_BT))

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`, with the weighted loss of the further tokens. The generator is not used."""
        hidden_BTD, counted_BT = self._hidden(model, batch), batch.counted_BT
        total, _ = summed_nats(model, hidden_BTD, batch.tokens_BT, batch.weights_BT, counted_BT)
        loss = total / batch.all_counted.clamp_min(1)
        if not self.ahead:
            return loss
        visibility = CAUSAL.packed(batch.starts_BT)
        further = []
        for k, ahead_BTD in enumerate(model.look_ahead(hidden_BTD, batch.tokens_BT, visibility), 1):
            weights_BT = _weights_ahead(batch, k)
            everywhere_BT = torch.ones_like(weights_BT, dtype=torch.bool)
            total, _ = summed_nats(model, ahead_BTD, batch.tokens_BT[:, k:], weights_BT, everywhere_BT)
            counted = weights_BT if batch.whole is None else _weights_ahead(batch.whole, k)
            further.append(total / (counted != 0).sum().clamp_min(1))
        return loss + self.ahead_weight * torch.stack(further).mean()

    @torch.no_grad()
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """As in `Objective`, exact. The generator is not used."""
        hidden_BTD, where_BT = self._hidden(model, batch), batch.counted_BT
        _, nats_BT = summed_nats(model, hidden_BTD, batch.tokens_BT, torch.ones_like(batch.weights_BT), where_BT)
        return Likelihood(nats_BT.double().sum(1), variance=0.0, exact=True)

    def denoiser(self, model: Model) -> "Continuation":
        return Continuation(model, self.eot)

    def default_sampler(self, request: Request) -> Autoregression:
        return Autoregression()

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        """As in `Objective`: each token is run once from the cached state, which in all is one causal pass, those that
        the copies of a prompt share once for all of them; and the head on the tokens drawn."""
        shared = min(map(len, request.prompts))
        saved = (1 - 1 / request.copies) * model.flops(shared, CAUSAL, 0.0) if shared else 0.0
        passes = fmean(model.flops(T, CAUSAL, 0.0) for T in samples.lengths_B.tolist())
        return passes - saved + samples.predictions * model.head_flops


def _weights_ahead(batch: Batch, k: int) -> Tensor:
    """Weights [B, T - k] of the tokens that stand k behind another of their document."""
    weights_BT, visibility = batch.weights_BT[:, k:], CAUSAL.packed(batch.starts_BT)
    if visibility.starts_BL is None:
        return weights_BT
    document_BT = visibility.documents()
    return weights_BT * (document_BT[:, k:] == document_BT[:, :-k])


@dataclass(frozen=True)
class Continuation:
    """A model that is decoded token by token; see `NextTokenDenoiser`."""

    model: Model
    start: int

    def empty_states(self, batch: int) -> list[State]:
        return self.model.empty_states(batch)

    def extend(self, tokens_BT: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        hidden_BTD, states = self.model.extend(tokens_BT, states, CAUSAL)
        return self.model.logits(hidden_BTD[:, -1]), states
