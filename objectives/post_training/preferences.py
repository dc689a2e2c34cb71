"""Learning from pairs of answers, one of which was preferred, without a reward model: DPO and its relatives.

Shape letters: B sequences (chosen and rejected in turn), P pairs, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from objectives.contracts import Batch, Objective
from objectives.post_training.tuning import Tuning, draw_seed, readings, repeated_noise, seeded, standing_still

Form = Literal["dpo", "dpo_by_length", "ipo", "simpo"]


class Preferences(Tuning):
    """With l the log-likelihood of an answer given its prompt, l_ref that of the model before the first step, and h =
    (l - l_ref) of the chosen answer less that of the rejected one,

        dpo            -log sigmoid(beta h)                          (Rafailov et al., arXiv 2305.18290, equation 7)
        dpo_by_length  the same, each l - l_ref over the answer's length
        ipo            (h - 1 / (2 beta))^2, by length as well        (Azar et al., 2310.12036, equation 17)
        simpo          -log sigmoid(beta (l / length of the chosen less that of the rejected - margin)), without l_ref
                       (Meng et al., 2405.14734, equation 6; margin is their gamma / beta)

    For diffusion l is the bound of the base, a mean of `draws` estimates, with the same times and masks for both models
    (VRPO, Zhu et al., 2505.19223).

    Args:
        base: the likelihood. eot: see `Tuning`.
        form: one of the above.
        beta: how far the model may move: 0.1 in DPO, 2.5 in SimPO.
        margin: of simpo.
        smoothing: the probability that the label of a pair is the wrong way round, for dpo (conservative DPO).
        draws: estimates of each bound; 1 where the likelihood is exact.

    Raises:
        ValueError: for a setting outside its range, or one that the form does not have.
    """

    def __init__(
        self,
        base: Objective,
        eot: int,
        form: Form = "dpo",
        beta: float = 0.1,
        margin: float = 0.0,
        smoothing: float = 0.0,
        draws: int = 1,
    ):
        super().__init__(base, eot)
        if not beta > 0:
            raise ValueError(f"beta={beta} must be above 0")
        if margin and form != "simpo":
            raise ValueError(f"margin={margin} is of form=simpo, and form={form} has none: leave it at 0")
        if not 0 <= smoothing < 0.5 or (smoothing and not form.startswith("dpo")):
            raise ValueError(f"smoothing={smoothing} must be 0, or for dpo at least 0 and below 0.5")
        if draws < 1:
            raise ValueError(f"draws={draws} must be at least 1")
        self.form, self.beta, self.margin, self.smoothing, self.draws = form, beta, margin, smoothing, draws
        self.reference: LanguageModel | None = None

    def begin(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """As in `Objective`: the reference is the model as it is now."""
        self.reference = None if self.form == "simpo" else standing_still(model)
        return () if self.reference is None else (self.reference,)

    def training_flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`, with the forward passes of the reference."""
        reference = 0.0 if self.form == "simpo" else self.base.flops(model, T, counted)
        return self.draws * (self.base.training_flops(model, T, counted) + reference)

    def noise(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """As in `Objective`, of all draws of the bound."""
        return repeated_noise(self.base, batch, self.draws, seeded(draw_seed(generator)))

    def log_likelihood(self, model: LanguageModel, noised: Sequence[Batch], generator: Generator) -> Tensor:
        """log p [B] of the answers, or its bound by these readings."""
        return torch.stack([-self.base.nats(model, batch, generator).sum(1) for batch in noised]).mean(0)

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`, in the mean over pairs.

        Raises:
            ValueError: for windows that are no pairs of answers.
        """
        if len(batch.tokens_BT) % 2 or not batch.counted_BT.any(1).all():
            raise ValueError(
                "preferences are learnt from windows of chosen and rejected answers in turn: choose such data, as "
                "data=preferences"
            )
        noised = readings(batch, self.noise_of(batch, generator), self.draws)
        score_B = self.log_likelihood(model, noised, generator)
        if self.reference is not None:
            with torch.no_grad():
                reference_B = self.log_likelihood(self.reference, noised, generator)
            score_B = score_B - reference_B
        if self.form != "dpo":
            score_B = score_B / batch.counted_BT.sum(1)
        chosen_P, rejected_P = score_B[0::2], score_B[1::2]
        h_P = chosen_P - rejected_P
        self.figures = {
            "preference_accuracy": (h_P > 0).double().mean().item(),
            "preference_margin": h_P.mean().item(),
            "chosen_score": chosen_P.mean().item(),
            "rejected_score": rejected_P.mean().item(),
        }
        if self.form == "ipo":
            return (h_P - 1 / (2 * self.beta)).square().mean() * batch.share
        z_P = self.beta * (h_P - self.margin)
        nats_P = -((1 - self.smoothing) * F.logsigmoid(z_P) + self.smoothing * F.logsigmoid(-z_P))
        return nats_P.mean() * batch.share
