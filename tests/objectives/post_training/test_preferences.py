"""Preferences: the optimum of each form by enumeration, and what each refuses."""

import itertools

import pytest
import torch
from torch.nn.functional import logsigmoid

from experiments.enumeration import END, SEQUENCES, START, L, Table, V, generator, gradient, rewards
from objectives.contracts import Batch
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.post_training.preferences import Preferences

BASE = NextToken(vocab_size=V, eot=START)
PAIRS = torch.tensor(list(itertools.permutations(range(len(SEQUENCES)), 2)))


class Whole(torch.nn.Module):
    """A policy with one free logit per sequence, read token by token."""

    def __init__(self, log_p):
        super().__init__()
        self.table = torch.nn.Parameter(log_p.clone())

    def log_p(self):
        return self.table.log_softmax(0)

    def hidden(self, tokens_BT, visibility=None, time=None):
        joint = self.log_p().exp().view(V, V, V)
        first = joint.sum((1, 2)).expand(len(tokens_BT), V)
        second = joint.sum(2)[tokens_BT[:, 1]]
        third = joint[tokens_BT[:, 1], tokens_BT[:, 2]]
        return torch.stack([(p / p.sum(-1, keepdim=True)).log() for p in (first, second, third)], 1)

    def logits(self, hidden):
        return hidden


def pairs_batch(pairs):
    tokens = SEQUENCES[pairs.flatten()]
    return Batch(tokens, torch.ones(tokens.shape, dtype=torch.float64))


def expected_gradient(objective, model, reward, weights):
    """Of the loss over all pairs, each with its weight, the label drawn by Bradley and Terry's rule."""
    total = 0
    for pair, weight in zip(PAIRS, weights, strict=True):
        chance = logsigmoid(reward[pair[0]] - reward[pair[1]]).exp()
        total = total + weight * chance * gradient(objective.loss(model, pairs_batch(pair[None]), generator()), model)
    return total


@pytest.fixture(scope="module")
def planted():
    log_ref = torch.randn(len(SEQUENCES), generator=generator(3), dtype=torch.float64).log_softmax(0)
    return log_ref, rewards(seed=4)


@pytest.mark.thorough
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_is_at_rest_at_the_reference_times_the_exponential_of_the_reward_and_nowhere_near(planted, beta):
    log_ref, reward = planted
    objective = Preferences(BASE, END, beta=beta)
    objective.begin(Whole(log_ref))
    weights = log_ref.exp()[PAIRS].prod(1)
    best = Whole((log_ref + reward / beta).log_softmax(0))
    assert expected_gradient(objective, best, reward, weights).abs().max() < 1e-12
    off = Whole(best.table.detach() + 0.1 * rewards(seed=9))
    assert expected_gradient(objective, off, reward, weights).abs().max() > 1e-4


@pytest.mark.thorough
def test_simpo_and_ipo_do_not_rest_there(planted):
    log_ref, reward = planted
    weights = log_ref.exp()[PAIRS].prod(1)
    best = Whole((log_ref + reward / 0.5).log_softmax(0))
    for form in ("simpo", "ipo"):
        objective = Preferences(BASE, END, form=form, beta=0.5)
        objective.begin(Whole(log_ref))
        assert expected_gradient(objective, best, reward, weights).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["dpo", "dpo_by_length", "ipo", "simpo"])
def test_each_form_is_its_formula(form):
    policy, reference = Table(causal=True), Table(causal=True, seed=5)
    objective = Preferences(BASE, END, form=form, beta=0.7, margin=0.3 if form == "simpo" else 0.0)
    objective.begin(reference)
    tokens = SEQUENCES[[3, 20, 7, 16]]
    weights = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]])
    batch = Batch(tokens, weights)
    log_p, log_ref = (-BASE.nats(m, batch, generator()).sum(1).detach() for m in (policy, reference))
    score = (log_p if form == "simpo" else log_p - log_ref) / (1 if form == "dpo" else weights.sum(1))
    h = score[0::2] - score[1::2]
    wanted = {"ipo": (h - 1 / 1.4) ** 2, "simpo": -logsigmoid(0.7 * (h - 0.3))}.get(form, -logsigmoid(0.7 * h)).mean()
    got = objective.loss(policy, batch, generator())
    torch.testing.assert_close(got.detach(), wanted, check_dtype=False)
    assert objective.telemetry()["preference_accuracy"] == (h > 0).double().mean()


def test_dpo_begins_at_log_two_and_smoothing_keeps_the_policy_from_being_sure():
    policy = Table(causal=True)
    objective = Preferences(BASE, END)
    objective.begin(policy)
    assert objective.loss(policy, pairs_batch(PAIRS[:4]), generator()).item() == pytest.approx(torch.tensor(2.0).log())
    sure = Table(causal=True, spread=8.0)
    smooth = Preferences(BASE, END, smoothing=0.2)
    smooth.begin(policy)
    objective.begin(policy)
    batch = pairs_batch(torch.tensor([[0, 1]]))
    a, b = (x.loss(sure, batch, generator()).item() for x in (objective, smooth))
    assert a != b


def test_the_bound_of_policy_and_reference_is_taken_with_the_same_noise():
    """Else the loss of two equal models would not be log 2."""
    base, policy = MaskedDiffusion(V, 0), Table(causal=False)
    objective = Preferences(base, END, draws=3)
    objective.begin(policy)
    losses = {round(objective.loss(policy, pairs_batch(PAIRS[:4]), generator(s)).item(), 12) for s in range(5)}
    assert losses == {round(float(torch.tensor(2.0).double().log()), 12)}


def test_the_loss_by_estimates_of_the_bound_tends_to_that_by_the_bound():
    base, policy, reference = MaskedDiffusion(V, 0), Table(causal=False), Table(causal=False, seed=5)
    batch = pairs_batch(torch.tensor([[3, 11]]))

    def mean(draws, repetitions):
        objective = Preferences(base, END, beta=1.0, draws=draws)
        objective.begin(reference)
        return sum(objective.loss(policy, batch, generator(s)).item() for s in range(repetitions)) / repetitions

    few, some, many = mean(1, 400), mean(8, 50), mean(400, 1)
    assert abs(some - many) < abs(few - many)


def test_tokens_of_the_prompt_are_not_learnt():
    """Their gradient under the objective is nought, though the prompt could be made likelier."""
    policy = Table(causal=True)
    objective = Preferences(BASE, END)
    objective.begin(Table(causal=True, seed=5))
    weights = torch.tensor([[0.0, 1, 1]]).expand(2, L)
    loss = objective.loss(policy, Batch(SEQUENCES[[4, 5]], weights), generator())
    first = torch.autograd.grad(loss, policy.table)[0][:, 0]
    assert loss > 0 and first.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"margin": 0.5}, "margin=0.5 is of form=simpo"),
        ({"smoothing": 0.5}, "smoothing=0.5 must be 0"),
        ({"form": "ipo", "smoothing": 0.1}, "smoothing=0.1 must be 0"),
        ({"draws": 0}, "draws=0 must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preferences(BASE, END, **options)


def test_windows_that_are_no_pairs_are_refused():
    objective = Preferences(BASE, END, form="simpo")
    with pytest.raises(ValueError, match="windows of chosen and rejected answers in turn"):
        objective.loss(Table(causal=True), Batch.of(SEQUENCES[:3]), generator())
