"""Reinforcement learning from rewards of whole answers: REINFORCE, GRPO and its published variants, as choices.

Shape letters: B sequences, G of each of P prompts side by side, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from objectives.contracts import Batch, Objective, Request, Sampler
from objectives.decoding.draws import Draw
from objectives.post_training.divergences import Estimator, kl_estimate
from objectives.post_training.sampled_likelihood import SampledLikelihood, Trajectory
from objectives.post_training.sharing import shared, together
from objectives.post_training.surrogates import Clipped, Surrogate
from objectives.post_training.tuning import (
    Reward,
    Tuning,
    draw_seed,
    evaluating,
    prompts_of,
    seeded,
    standing_still,
    writing_flops,
)

Baseline = Literal["none", "group", "leave_one_out"]
Scale = Literal["none", "group", "batch"]
Normaliser = Literal["sequences", "length", "tokens"]
LITTLE = 1e-4  # beside a standard deviation that may be 0, as in GRPO


@dataclass(frozen=True)
class KLPenalty:
    """Keeps the policy near the model before the first step.

    coefficient: of the divergence; 0 to watch it in TensorBoard and no more. estimator: see `kl_estimate`. place:
    "reward" takes it off the reward, with all of its gradient in the policy's own; "loss" adds its own gradient to the
    loss, token by token: that of each next token given the text so far, and not of which text is then come to (Liu et
    al., arXiv 2510.01555).
    """

    coefficient: float
    estimator: Estimator = "k2"
    place: Literal["reward", "loss"] = "loss"

    def __post_init__(self):
        if not self.coefficient >= 0:
            raise ValueError(f"kl.coefficient={self.coefficient} must be at least 0, which only watches the divergence")


@dataclass(frozen=True)
class Correction:
    """Weighs samples by how much likelier the learner makes them than the sampler that wrote them, where the two
    differ: a temperature, a cut tail, another precision.

    level: "sequence", which is unbiased while nothing is cut, or "token". most: where weights are cut (truncated
    importance sampling, Yao et al., 2025). least: below it, and above `most`, a weight is 0 instead (IcePop); null to
    cut.
    """

    level: Literal["token", "sequence"] = "sequence"
    most: float = 2.0
    least: float | None = None

    def weights(self, learner_BT: Tensor, sampler_BT: Tensor) -> Tensor:
        """Weights [B, T] of log-probabilities [B, T], each 0 at tokens that were not drawn."""
        log_w_BT = learner_BT - sampler_BT
        if self.level == "sequence":
            log_w_BT = log_w_BT.sum(1, keepdim=True).expand_as(log_w_BT)
        w_BT = log_w_BT.exp()
        if self.least is None:
            return w_BT.clamp(max=self.most)
        return w_BT.where((w_BT >= self.least) & (w_BT <= self.most), 0.0)


class PolicyGradient(Tuning):
    """Writes `group` answers to each prompt, has them rewarded, and makes those that were better than the others of
    their group likelier (GRPO, Shao et al., arXiv 2402.03300). With the defaults it is REINFORCE with a leave-one-out
    baseline (RLOO, Ahmadian et al., 2402.14740), whose expected gradient is that of the expected reward.

    Args:
        base: the likelihood, which also writes. eot: see `Tuning`.
        reward: what an answer is worth.
        likelihood: what is differentiated as log p of an answer.
        group: answers per prompt.
        sampler: how answers are written; None for the default of the base.
        draw: how tokens are drawn.
        baseline: what is taken off a reward: nothing, the mean of its group, or the mean of the others in it.
        scale: what that is divided by: nothing, the standard deviation of its group (GRPO), or of the batch (Liu et
            al., 2508.08221).
        normaliser: what the sum over all tokens is divided by: the number of sequences, which alone leaves the gradient
            that of the expected reward (Dr. GRPO, 2503.20783, but for a constant, which AdamW does not see); each
            sequence by its own length first (GRPO); or the number of all tokens (DAPO, 2503.14476).
        ratio: between the policy now and when it wrote: of each "token", or the geometric mean over a "sequence" (GSPO,
            Zheng et al., 2507.18071).
        surrogate: what is made of ratio and advantage.
        kl: a penalty on moving, or None.
        correction: of the difference between sampler and learner, or None.
        stale: sequences of negative advantage whose mean log-ratio has fallen below minus this are left out
            (DeepSeek-V3.2, arXiv 2512.02556); None to keep all.
        truncated: whether answers without an end count: "kept", or "masked" (DAPO's overlong filtering).
        updates: optimiser steps on what was written once.

    Raises:
        ValueError: for a likelihood that the base or the sampler does not have, samples that are not the model's own
            and not corrected for, a group too small for its baseline, or a setting
            outside its range.
    """

    def __init__(
        self,
        base: Objective,
        eot: int,
        reward: Reward,
        likelihood: SampledLikelihood,
        group: int = 8,
        sampler: Sampler | None = None,
        draw: Draw = Draw(),
        baseline: Baseline = "leave_one_out",
        scale: Scale = "none",
        normaliser: Normaliser = "sequences",
        ratio: Literal["token", "sequence"] = "token",
        surrogate: Surrogate = Clipped(),
        kl: KLPenalty | None = None,
        correction: Correction | None = None,
        stale: float | None = None,
        truncated: Literal["kept", "masked"] = "kept",
        updates: int = 1,
    ):
        super().__init__(base, eot)
        likelihood.check(base)
        if group < 1 or (group < 2 and (baseline != "none" or scale == "group")):
            raise ValueError(f"group={group} must be at least 1, and 2 for a baseline or a scale of the group")
        if updates < 1:
            raise ValueError(f"updates={updates} must be at least 1")
        if sampler and not sampler.blind and isinstance(likelihood, Trajectory):
            raise ValueError(
                f"sampler={sampler}: where it writes depends on what the model says, or what it wrote does not stay, "
                "so its trajectory has no likelihood that could be replayed: choose Ancestral, or Ordered by=random"
            )
        if correction is None and draw != Draw():
            raise ValueError(
                f"temperature={draw.temperature}, top_p={draw.top_p} is not the distribution of the model that learns: "
                "set a correction, or draw with temperature=1 top_p=1"
            )
        if correction and (draw.temperature == 0 or draw.top_p < 1 and correction.level == "sequence"):
            raise ValueError(
                f"correction={correction.level} cannot mend temperature={draw.temperature}, top_p={draw.top_p}: what "
                "is never drawn has no weight; draw from the whole distribution, or correct by token"
            )
        self.reward, self.likelihood = reward, likelihood
        self.group, self.sampler, self.draw = group, sampler, draw
        self.baseline, self.scale, self.normaliser, self.ratio = baseline, scale, normaliser, ratio
        self.surrogate, self.kl, self.correction, self.stale = surrogate, kl, correction, stale
        self.truncated, self.updates = truncated, updates
        self.answers, self.writes, self.even = group, True, not isinstance(likelihood, Trajectory)
        self.reference: LanguageModel | None = None
        self.of_experience: dict[str, float] = {}
        self.rollouts: list[tuple[Tensor, float]] = []

    def begin(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """As in `Objective`: the reference of the penalty is the model as it is now."""
        self.reference = standing_still(model) if self.kl else None
        return self.reward.models if self.reference is None else (self.reference, *self.reward.models)

    def training_flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`, of one prompt with all of its answers, each as long as the window allows: written, read by
        the learner, and by the reference and the older policy where there are such."""
        passes = self.likelihood.passes(round(counted * T))
        read = passes * self.base.flops(model, T, counted)
        once = writing_flops(self.base, model, T, counted, self.group, self.sampler) + self.reward.flops(T)
        once += read * (bool(self.kl) + self._remembers)
        return self.group * (passes * self.base.training_flops(model, T, counted) + once / self.updates)

    @property
    def _remembers(self) -> bool:
        """Return True where log-probabilities of the policy that wrote are kept."""
        return self.updates > 1 or self.correction is not None or (self.kl is not None and self.kl.place == "reward")

    def experience(self, model: LanguageModel, batch: Batch, generator: Generator) -> Batch:
        """Return answers to the prompts of a batch, G side by side, with what they taught: extras "advantage" [B],
        "order" [B, T], "seed" [B] of the noise that all readings share, and "older", "weight", "reference" [B, T] where
        they are asked for."""
        prompts, T = prompts_of(batch), batch.tokens_BT.shape[1]
        with evaluating(model):
            request = Request(prompts, T, generator, self.draw, copies=self.group, stop=(self.eot,))
            samples = self.base.sample(shared(model), request, self.sampler)
            drawn_BT, answer_BT, lengths_B = samples.order_BT >= 0, samples.answers_BT, samples.lengths_B
            B, device = len(drawn_BT), drawn_BT.device
            reward_B = together(lambda rows: self.reward(samples.tokens_BT[rows], answer_BT[rows]).to(device), B)
            ended_B = (answer_BT & (samples.tokens_BT == self.eot)).any(1)
            counted_BT = drawn_BT if self.truncated == "kept" else drawn_BT & ended_B[:, None]
            extras = {"order": samples.order_BT, "seed": torch.full_like(lengths_B, draw_seed(generator))}
            written = Batch(samples.tokens_BT, counted_BT.float(), extras=extras)
            noised = replace(written, noise=self.noise(written, generator))
            if self._remembers:
                extras["older"] = together(lambda rows: self._log_probs(model, noised.part(rows)), B)
            if self.correction:
                sampled_BT = samples.log_probs_BT.where(counted_BT, 0.0).to(extras["older"])
                extras["weight"] = self.correction.weights(extras["older"], sampled_BT)
            if (reference := self.reference) is not None:
                extras["reference"] = together(lambda rows: self._log_probs(reference, noised.part(rows)), B)
            kept_B = reward_B
            if self.kl and self.kl.place == "reward":
                moved_BT = kl_estimate(extras["older"], extras["reference"], self.kl.estimator)
                kept_B = reward_B - self.kl.coefficient * moved_BT.sum(1)
            extras["advantage"] = self.advantages(kept_B.view(-1, self.group)).flatten()
        ends = zip(samples.tokens_BT, lengths_B.tolist(), reward_B.tolist(), strict=True)
        self.rollouts = [(tokens_T[:length], reward) for tokens_T, length, reward in ends]
        reward_PG, drawn = reward_B.view(-1, self.group), drawn_BT.sum().clamp(min=1)
        self.of_experience = {
            "reward": reward_B.mean().item(),
            "groups_without_signal": (reward_PG == reward_PG[:, :1]).all(1).double().mean().item(),
            "answer_length": answer_BT.sum(1).double().mean().item(),
            "answers_ended": ended_B.double().mean().item(),
            "entropy": (-samples.log_probs_BT.where(drawn_BT, 0.0).sum() / drawn).item(),
        }
        return written

    def written(self) -> Sequence[tuple[Tensor, float]]:
        return self.rollouts

    def advantages(self, reward_PG: Tensor) -> Tensor:
        """Advantages [P, G] of rewards of the G answers to each of P prompts."""
        G = reward_PG.shape[1]
        advantage_PG = reward_PG
        if self.baseline != "none":
            advantage_PG = reward_PG - reward_PG.mean(1, keepdim=True)
        if self.baseline == "leave_one_out":
            advantage_PG = advantage_PG * G / (G - 1)
        match self.scale:
            case "group":
                advantage_PG = advantage_PG / (reward_PG.std(1, keepdim=True) + LITTLE)
            case "batch":
                advantage_PG = advantage_PG / (reward_PG.std() + LITTLE)
        return advantage_PG

    def noise(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """As in `Objective`: by the seed of the experience."""
        return self.likelihood.noise(self.base, batch, seeded(int(batch.extras["seed"][0])))

    def _log_probs(self, model: LanguageModel, batch: Batch) -> Tensor:
        """Log-probabilities [B, T], by noise that is the same in every reading of one experience."""
        return self.likelihood.log_probs(self.base, model, batch, seeded(int(batch.extras["seed"][0])))

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`, of an `experience`: minus what the surrogate makes of it, plus the penalty. Its value says
        nothing; its gradient does."""
        extras, counted_BT = batch.extras, batch.counted_BT
        length_B1 = counted_BT.sum(1, keepdim=True).clamp(min=1)
        log_p_BT = self._log_probs(model, batch)
        log_ratio_BT = log_p_BT - extras.get("older", log_p_BT.detach())
        if self.ratio == "sequence":
            log_ratio_BT = (log_ratio_BT.sum(1, keepdim=True) / length_B1).expand_as(log_ratio_BT)
        advantage_BT = extras["advantage"].to(log_p_BT)[:, None].expand_as(log_p_BT)
        gain_BT = self.surrogate(log_ratio_BT, advantage_BT) * extras.get("weight", 1.0)
        ratios = log_ratio_BT.detach()[counted_BT]  # a part of a batch may have none
        self.figures = self.of_experience | {"ratio_spread": ratios.std().item() if len(ratios) > 1 else 0.0}
        if self.kl:
            shown_BT = kl_estimate(log_p_BT.detach(), extras["reference"], "k3")
            self.figures["kl"] = shown_BT.sum(1).mean().item()
            if self.kl.place == "loss":
                moved_BT = kl_estimate(log_p_BT, extras["reference"], self.kl.estimator)
                gain_BT = gain_BT - self.kl.coefficient * moved_BT
        if self.stale is not None:
            fresh_B = (log_ratio_BT.detach().sum(1) / length_B1[:, 0] >= -self.stale) | (extras["advantage"] >= 0)
            gain_BT = gain_BT * fresh_B[:, None]
        gain_BT = gain_BT.where(counted_BT, 0.0)
        sequences = len((batch.whole or batch).tokens_BT)
        match self.normaliser:
            case "sequences":
                return -gain_BT.sum() / sequences
            case "length":
                return -(gain_BT / length_B1).sum() / sequences
            case "tokens":
                return -gain_BT.sum() / batch.all_counted.clamp(min=1)
        raise ValueError(f"normaliser={self.normaliser!r} must be one of sequences, length, tokens")
