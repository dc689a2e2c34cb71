"""A reward model: a scalar for a finished answer, learnt from pairs of which one was preferred.

Shape letters: B sequences (chosen and rejected in turn), P pairs, T tokens, D model width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL, CAUSAL
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Sampler, Samples
from objectives.likelihood import Likelihood
from objectives.post_training.tuning import Reward, Trained, evaluating


class RewardModel(Objective):
    """-log p(chosen before rejected) = -log sigmoid(r(chosen) - r(rejected) - margin) (Bradley-Terry; Ouyang et al.,
    arXiv 2203.02155, equation 1), r being a linear map of the last token of the answer, zero at first.

    It reads text and writes none, so there is one for every backbone, whatever objective that was pre-trained under.

    Args:
        vocab_size: number of token ids of the data.
        eot: id of the end-of-text token, which also stands in front of a causal input.
        causal: whether it reads from left to right, or in both directions.
        margin: by which the chosen answer is to be ahead.
        centring: coefficient of (r(chosen) + r(rejected))^2, which keeps rewards around 0 (Eisenstein et al., arXiv
            2312.09244).

    Raises:
        ValueError: for a negative coefficient.
    """

    samplers = ()
    reads_head = False
    model_options: Mapping[str, Any] = {"scored": True}

    def __init__(self, vocab_size: int, eot: int, causal: bool = True, margin: float = 0.0, centring: float = 0.01):
        if margin < 0 or centring < 0:
            raise ValueError(f"margin={margin} and centring={centring} must not be negative")
        self.vocab_size = self.model_vocab_size = vocab_size
        self.visibility = CAUSAL if causal else BIDIRECTIONAL
        self.eot, self.margin, self.centring = eot, margin, centring
        self.figures: dict[str, float] = {}

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: the head is not run, and the map to a scalar is next to nothing."""
        return model.flops(T, self.visibility, 0.0)

    def rewards(self, model: Model, tokens_BT: Tensor, answer_BT: Tensor) -> Tensor:
        """Rewards [B] of sequences, read at the last token of each answer."""
        T = tokens_BT.shape[1]
        last_B = T - 1 - answer_BT.flip(1).byte().argmax(1)
        behind_BT = torch.arange(T, device=tokens_BT.device) > last_B[:, None]
        # What stands behind an answer is not read; in both directions, as a document of its own.
        starts_BT = None if self.visibility is CAUSAL else behind_BT & ~behind_BT.roll(1, 1)
        hidden_BTD = model.hidden(tokens_BT.masked_fill(behind_BT, self.eot), self.visibility.packed(starts_BT))
        assert isinstance(model, LanguageModel)  # no stand-in has scores
        return model.scores(hidden_BTD[torch.arange(len(tokens_BT)), last_B])

    def _nats(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """-log p [P] that the chosen answer is, and the rewards [B]."""
        if len(batch.tokens_BT) % 2:
            raise ValueError(
                "a reward model learns from windows of chosen and rejected answers in turn: choose such data, as "
                "data=preferences"
            )
        reward_B = self.rewards(model, batch.tokens_BT, batch.counted_BT)
        return -F.logsigmoid(reward_B[0::2] - reward_B[1::2] - self.margin), reward_B

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`, in the mean over pairs. The generator is not used."""
        nats_P, reward_B = self._nats(model, batch)
        chosen_P, rejected_P = reward_B[0::2], reward_B[1::2]
        self.figures = {
            "preference_accuracy": (chosen_P > rejected_P).double().mean().item(),
            "reward_mean": reward_B.mean().item(),
        }
        return (nats_P.mean() + self.centring * (chosen_P + rejected_P).square().mean()) * batch.share

    def telemetry(self) -> dict[str, float]:
        return self.figures

    @torch.no_grad()
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """Nats of the label of each pair, at its chosen answer; 0 at the rejected one."""
        nats_P, _ = self._nats(model, batch)
        return Likelihood(torch.stack([nats_P, torch.zeros_like(nats_P)], 1).flatten().double(), 0.0, exact=True)

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        raise ValueError(NO_TEXT)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        raise ValueError(NO_TEXT)

    def denoiser(self, model: Model) -> Any:
        raise ValueError(NO_TEXT)

    def default_sampler(self, request: Request) -> Sampler:
        raise ValueError(NO_TEXT)

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        raise ValueError(NO_TEXT)


NO_TEXT = "a reward model reads text and writes none: choose a run of another objective"


class LearntReward(Reward):
    """The reward that a trained reward model gives.

    Raises:
        ValueError: for a model of another objective.
    """

    def __init__(self, judge: Trained):
        if not isinstance(judge.objective, RewardModel):
            raise ValueError(
                f"a run of {type(judge.objective).__name__} gives no rewards: give one of objective=reward_model"
            )
        self.model, self.objective = judge.model.requires_grad_(False), judge.objective
        self.models = (self.model,)

    def __call__(self, tokens_BT: Tensor, drawn_BT: Tensor) -> Tensor:
        with evaluating(self.model):
            return self.objective.rewards(self.model, tokens_BT, drawn_BT).double()

    def flops(self, T: int) -> float:
        return self.objective.flops(self.model, T)
