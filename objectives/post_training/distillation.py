"""Learning from another model's distributions, over its text, the data's or the student's own.

Shape letters: B sequences, T tokens, N positions picked out of a batch, V token ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from objectives.contracts import Batch, Objective, Request
from objectives.likelihood import mean_nats
from objectives.post_training.divergences import mixed_kl
from objectives.post_training.sharing import shared
from objectives.post_training.tuning import Trained, Tuning, draw_seed, evaluating, prompts_of, seeded, writing_flops

Text = Literal["data", "teacher", "student"]


class Distillation(Tuning):
    """At every token that is predicted, the generalised Jensen-Shannon divergence between the student's distribution
    and the teacher's, over the whole vocabulary (GKD, Agarwal et al., arXiv 2306.13649), with the base's weights: for
    diffusion that is the divergence of the two denoisers on the same noised text.

    A teacher of another kind than the student (autoregressive for a diffusion student, or the other way round)
    predicts from other things, so its distributions do not compare; its text does: with `text` of the teacher and
    `hard` the student learns what the teacher has written, which minimises KL(teacher || student) over sequences.

    Args:
        base: the student's likelihood. eot: see `Tuning`.
        teacher: another run's model and objective, of the same vocabulary.
        mixture: 0 for the forward KL(teacher || student), 1 for the reverse, between them the mixture.
        text: what is read: the "data", or answers to its prompts by the "teacher" or the "student" (on-policy).
        hard: whether the text is learnt as it stands, and no distribution of the teacher is read.

    Raises:
        ValueError: for a teacher that does not fit, or a setting outside its range.
    """

    def __init__(
        self,
        base: Objective,
        eot: int,
        teacher: Trained,
        mixture: float = 0.0,
        text: Text = "data",
        hard: bool = False,
    ):
        super().__init__(base, eot)
        if not 0 <= mixture <= 1:
            raise ValueError(f"mixture={mixture} must be from 0 (forward KL) to 1 (reverse KL)")
        if teacher.objective.vocab_size != base.vocab_size:
            raise ValueError(
                f"the teacher has {teacher.objective.vocab_size} token ids and the student {base.vocab_size}: choose a "
                "teacher that was trained on the same vocabulary"
            )
        if hard and text != "teacher":
            raise ValueError(f"hard=true learns text as it stands, which text={text} does without a teacher")
        if not hard and type(teacher.objective) is not type(base):
            raise ValueError(
                f"a teacher of {type(teacher.objective).__name__} and a student of {type(base).__name__} do not "
                "predict from the same tokens: choose text=teacher hard=true, which learns from what the teacher writes"
            )
        self.teacher, self.mixture, self.text, self.hard = teacher, mixture, text, hard
        self.writes = text == "student"

    def begin(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """As in `Objective`: the teacher stands still."""
        return (self.teacher.model.eval().requires_grad_(False),)

    def training_flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`, with the teacher's passes and what is written, as long as the window allows."""
        flops = self.base.training_flops(model, T, counted) + self.teaching_flops(T, counted)
        if self.text == "student":
            flops += writing_flops(self.base, model, T, counted, 1, None)
        return flops

    def teaching_flops(self, T: int, counted: float = 1.0) -> float:
        """FLOPs of the teacher alone for one document of T tokens, a fraction `counted` of which are predicted."""
        model, objective = self.teacher.model, self.teacher.objective
        flops = 0.0 if self.hard else objective.flops(model, T, counted)
        if self.text == "teacher":
            flops += writing_flops(objective, model, T, counted, 1, None)
        return flops

    def experience(self, model: LanguageModel, batch: Batch, generator: Generator) -> Batch:
        """As in `Objective`: the prompts of the batch, answered by the one who writes."""
        if self.text == "data":
            return batch
        writer = self.teacher if self.text == "teacher" else Trained(model, self.base)
        T = batch.tokens_BT.shape[1]
        with evaluating(writer.model):
            request = Request(prompts_of(batch), T, generator, stop=(self.eot,))
            samples = writer.objective.sample(shared(writer.model), request)
        return Batch(samples.tokens_BT, samples.answers_BT.float())

    def noise(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """As in `Objective`: that of the student and that of the teacher, by one seed."""
        if self.hard:
            return self.base.noise(batch, generator)
        seed = draw_seed(generator)
        of = {"student": self.base, "teacher": self.teacher.objective}
        drawn = {who: objective.noise(batch, seeded(seed)) for who, objective in of.items()}
        return {f"{who}.{name}": x for who, noise in drawn.items() for name, x in noise.items()}

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`: nats of divergence per token that counts."""
        if self.hard:
            return self.base.loss(model, batch, generator)
        noise = self.noise_of(batch, generator)
        student = self.base.predictions(model, _noised(batch, noise, "student."), generator)
        with torch.no_grad():
            noised = _noised(batch, noise, "teacher.")
            teacher = self.teacher.objective.predictions(self.teacher.model, noised, generator)
        if not torch.equal(student.where_BT, teacher.where_BT):
            raise ValueError("teacher and student noise other tokens: give the teacher's objective the same settings")
        log_p_NV, log_teacher_NV = (log_probs(said.logits_NV) for said in (student, teacher))
        nats_N = mixed_kl(log_p_NV, log_teacher_NV, self.mixture)
        nats_BT = nats_N.new_zeros(batch.tokens_BT.shape).masked_scatter(student.where_BT, nats_N)
        self.figures = {"divergence": nats_N.detach().mean().item()}
        return mean_nats(nats_BT * student.weights_BT.to(nats_BT), batch.weights_BT, batch.all_counted)


def _noised(batch: Batch, noise: Mapping[str, Tensor], whose: str) -> Batch:
    named = {name.removeprefix(whose): x for name, x in noise.items() if name.startswith(whose)}
    return replace(batch, noise=named)


def log_probs(logits_NV: Tensor) -> Tensor:
    """Logarithms [N, V] of the distributions, in float32 or wider."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
