"""Policy gradients on a language of which everything can be enumerated: the expected gradient of each choice against
that of the expected reward."""

import pytest
import torch

from archs.visibility import CAUSAL
from experiments.enumeration import (
    END,
    SEQUENCES,
    START,
    Known,
    Table,
    V,
    answers,
    cosine,
    generator,
    gradient,
    group_gradient,
    log_probs,
    rewards,
)
from objectives.contracts import Batch
from objectives.decoding.draws import Draw
from objectives.decoding.unmasking import LeftToRight, Ordered, Remask, Threshold
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.post_training.divergences import kl, kl_estimate
from objectives.post_training.policy_gradient import Correction, KLPenalty, PolicyGradient
from objectives.post_training.sampled_likelihood import Exact, Trajectory
from objectives.post_training.surrogates import Clipped, ClippedWeight, Soft

MASKED = MaskedDiffusion(vocab_size=V, eot=START)
BASE = NextToken(vocab_size=V, eot=START)
REWARD = Known(SEQUENCES, rewards())
SURROGATES = [Clipped(), Clipped(most=3.0), ClippedWeight(), Soft()]


def build(**options):
    return PolicyGradient(BASE, END, likelihood=Exact(), **{"reward": REWARD, "group": 2} | options)


def truth(model, tokens, counted, reward):
    """The gradient of the expected reward."""
    return gradient((log_probs(BASE, model, tokens, counted).exp() * reward).sum(), model)


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize(("baseline", "factor"), [("none", 1.0), ("leave_one_out", 1.0), ("group", 0.5)])
def test_without_scale_and_by_sequences_the_expected_gradient_is_that_of_the_expected_reward(
    ending, surrogate, baseline, factor
):
    """The mean of the group holds the sample itself, which leaves (G - 1) / G of the gradient."""
    model, (tokens, counted) = Table(causal=True), answers(ending)
    reward = rewards(len(tokens))
    objective = build(reward=Known(tokens, reward), baseline=baseline, surrogate=surrogate)
    got = group_gradient(objective, model, tokens, counted)
    torch.testing.assert_close(got, factor * truth(model, tokens, counted, reward), rtol=1e-10, atol=1e-12)


def test_answers_of_all_lengths_are_the_whole_language():
    model, (tokens, counted) = Table(causal=True), answers(True)
    assert log_probs(BASE, model, tokens, counted).exp().sum().item() == pytest.approx(1.0)
    assert len(tokens) == 2**3 + 4 + 2 + 1 and set(counted.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "ending", "least", "most"),
    [
        ({"normaliser": "length"}, False, 1.0, 1.0),  # nothing is lost where all answers are as long
        ({"normaliser": "length"}, True, 0.9, 0.9999),  # length bias
        ({"scale": "group", "baseline": "group"}, False, 0.5, 0.9999),  # the easiest and the hardest weigh more
    ],
)
def test_what_is_biased_is_off_by_an_angle(options, ending, least, most):
    model, (tokens, counted) = Table(causal=True), answers(ending)
    reward = rewards(len(tokens))
    objective = build(reward=Known(tokens, reward), **options)
    got = cosine(group_gradient(objective, model, tokens, counted), truth(model, tokens, counted, reward))
    assert least - 1e-9 <= got <= most + 1e-9


def written(model, tokens, advantage, **extras):
    rows = torch.arange(len(tokens))
    extras = {"advantage": advantage, "order": torch.zeros_like(tokens), "seed": torch.zeros_like(rows)} | extras
    return Batch(tokens, torch.ones(tokens.shape, dtype=torch.float64), extras=extras)


def test_at_the_policy_that_wrote_the_value_of_the_loss_is_nought_and_its_gradient_is_not():
    model = Table(causal=True)
    objective = build(baseline="group", scale="group", normaliser="length")
    advantage = objective.advantages(rewards(4).view(2, 2)).flatten()
    loss = objective.loss(model, written(model, SEQUENCES[[3, 9, 14, 22]], advantage), generator())
    assert abs(loss.item()) < 1e-12 and gradient(loss, model).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_clip_stops_the_gradient_of_what_has_moved_far_enough_the_right_way_and_of_nothing_else(ratio):
    model = Table(causal=True)
    tokens = SEQUENCES[[3, 14]]
    now = -BASE.nats(model, Batch.of(tokens), generator()).detach()
    advantage = torch.tensor([1.0, -1.0]).double()
    objective = build(ratio=ratio)
    for moved, moves in ((1.0, False), (-1.0, True)):  # the good one likelier and the bad one rarer, or the reverse
        older = now - moved * advantage[:, None]
        loss = objective.loss(model, written(model, tokens, advantage, older=older), generator())
        assert (gradient(loss, model).abs().max() > 0) == moves
    weighted = build(ratio=ratio, surrogate=ClippedWeight())
    loss = weighted.loss(model, written(model, tokens, advantage, older=now - 3.0), generator())
    assert gradient(loss, model).abs().max() > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_samples_of_another_temperature_are_unbiased_when_weighed_by_sequence_and_not_by_token(level):
    model, reward = Table(causal=True), rewards()
    counted = torch.ones_like(SEQUENCES, dtype=torch.bool)
    learner = -BASE.nats(model, Batch.of(SEQUENCES), generator()).detach()
    hot = Draw(temperature=2.0).probabilities(
        model.hidden(torch.nn.functional.pad(SEQUENCES[:, :-1], (1, 0), value=START))
    )
    sampler = hot.gather(2, SEQUENCES[..., None])[..., 0].log().detach()
    correction = Correction(level=level, most=1e9)
    objective = build(baseline="none", group=1, correction=correction)
    extras = {"older": learner, "weight": correction.weights(learner, sampler)}
    p = sampler.sum(1).exp() * len(SEQUENCES)
    loss = objective.loss(model, written(model, SEQUENCES, reward * p, **extras), generator())
    off = (-gradient(loss, model) - truth(model, SEQUENCES, counted, reward)).abs().max()
    assert off < 1e-12 if level == "sequence" else off > 1e-3


KL_GRADIENTS = {  # what each estimator's gradient is in expectation, in the loss and in the reward
    ("k1", "loss"): "nothing",
    ("k2", "loss"): "reverse",
    ("k3", "loss"): "forward",
    ("k1", "reward"): "reverse",
    ("k2", "reward"): "another",
    ("k3", "reward"): "another",
}


@pytest.mark.parametrize(("estimator", "place"), list(KL_GRADIENTS))
def test_each_estimator_of_a_divergence_has_the_gradient_that_is_said_of_it(estimator, place):
    model, reference = Table(causal=True), Table(causal=True, seed=5)
    log_ref = log_probs(BASE, reference, SEQUENCES, SEQUENCES >= 0).detach()
    log_p = log_probs(BASE, model, SEQUENCES, SEQUENCES >= 0)
    p, ref = log_p.exp(), log_ref.exp()
    estimates = kl_estimate(log_p, log_ref, estimator)
    if place == "loss":
        got = gradient((p.detach() * estimates).sum(), model, keep=True)
    else:
        got = gradient((p.detach() * estimates.detach() * log_p).sum(), model, keep=True)
    reverse = gradient((p * (log_p - log_ref)).sum(), model, keep=True)
    forward = gradient((ref * (log_ref - log_p)).sum(), model)
    close = {name: torch.allclose(got, is_, atol=1e-12) for name, is_ in (("reverse", reverse), ("forward", forward))}
    close["nothing"] = bool(got.abs().max() < 1e-12)
    assert [name for name, is_ in close.items() if is_] == [
        n for n in [KL_GRADIENTS[estimator, place]] if n != "another"
    ]


def test_the_values_of_the_divergence_estimators_are_unbiased_or_not_as_is_said():
    log_p, log_ref = (log_probs(BASE, Table(causal=True, seed=s), SEQUENCES, SEQUENCES >= 0).detach() for s in (0, 5))
    true = (log_p.exp() * (log_p - log_ref)).sum().item()
    mean = {k: (log_p.exp() * kl_estimate(log_p, log_ref, k)).sum().item() for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(true) == mean["k3"] and abs(mean["k2"] - true) > 1e-2
    assert (kl_estimate(log_p, log_ref, "k3") >= 0).all() and (kl_estimate(log_p, log_ref, "k1") < 0).any()


def test_a_penalty_in_the_loss_has_the_gradient_of_the_divergence_of_each_next_token():
    model, reference = Table(causal=True), Table(causal=True, seed=5)
    objective = build(kl=KLPenalty(0.5, "k2", "loss"), baseline="none", group=1)
    p = log_probs(BASE, model, SEQUENCES, SEQUENCES >= 0).exp().detach()
    reading = -BASE.nats(reference, Batch.of(SEQUENCES), generator()).detach()
    many = torch.multinomial(p, 4000, replacement=True, generator=generator())
    batch = written(model, SEQUENCES[many], torch.zeros(4000).double(), reference=reading[many])
    got = gradient(objective.loss(model, batch, generator()), model)
    inputs = torch.nn.functional.pad(SEQUENCES[:, :-1], (1, 0), value=START)
    log_p, log_ref = (policy.hidden(inputs, CAUSAL).log_softmax(-1) for policy in (model, reference))
    tokenwise = gradient((p[:, None] * kl(log_p, log_ref.detach())).sum(), model)
    assert cosine(got, tokenwise) > 0.99 and objective.telemetry()["kl"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 1}, "group=1 must be at least 1, and 2 for a baseline"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"correction": Correction(), "draw": Draw(top_p=0.9)}, "what is never drawn has no weight"),
        (
            {"draw": Draw(temperature=0.7)},
            "temperature=0.7, top_p=1.0 is not the distribution of the model that learns",
        ),
        (
            {"base": MASKED, "likelihood": Trajectory(), "sampler": Threshold(0.9)},
            "has no likelihood that could be repl",
        ),
        (
            {"base": MASKED, "likelihood": Trajectory(), "sampler": LeftToRight(2, Ordered("margin", 1))},
            "depends on what",
        ),
        ({"base": MASKED, "likelihood": Trajectory(), "sampler": Remask(4, 0.1)}, "what it wrote does not stay"),
        ({"likelihood": Trajectory()}, "likelihood=Trajectory cannot be read from NextToken, only from"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**{"base": BASE, "eot": END, "reward": REWARD, "likelihood": Exact()} | options)


def test_advantages_are_what_is_said_of_them():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).double()
    assert build(baseline="none").advantages(reward).equal(reward)
    assert build(baseline="group").advantages(reward).tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0] * 4]
    loo = build(baseline="leave_one_out").advantages(reward)
    torch.testing.assert_close(loo[0], torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3]).double())
    by_group = build(baseline="group", scale="group").advantages(reward)
    assert by_group[0, 0].item() == pytest.approx(0.5 / (3**-0.5 + 1e-4)) and (by_group[1] == 0).all()
