"""Reward models: what they read, what they learn, and that a reward is one."""

import math
from dataclasses import replace

import pytest
import torch

from objectives.contracts import Batch
from objectives.next_token import NextToken
from objectives.post_training.reward_model import LearntReward, RewardModel
from objectives.post_training.tuning import Trained
from tests.contracts.test_objectives import model_for

V, EOT, T = 16, 15, 10


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def answers(B=6, length=4):
    tokens = torch.randint(V - 1, (B, T), generator=generator())
    marked = torch.zeros(B, T, dtype=torch.bool)
    marked[:, 3 : 3 + length] = True
    return Batch(tokens, marked.float())


def scored(objective):
    model = model_for(objective).eval()
    with torch.no_grad():
        model.score.weight.normal_(generator=generator())
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_a_reward_is_read_at_the_last_token_of_the_answer_and_from_nothing_behind_it(causal):
    objective = RewardModel(V, EOT, causal=causal)
    model, batch = scored(objective), answers()
    got = objective.rewards(model, batch.tokens_BT, batch.counted_BT)
    behind = batch.tokens_BT.clone()
    behind[:, 7:] = 1
    assert torch.equal(objective.rewards(model, behind, batch.counted_BT), got)
    alone = objective.rewards(model, batch.tokens_BT[:, :7], batch.counted_BT[:, :7])
    torch.testing.assert_close(got, alone)
    within = batch.tokens_BT.clone()
    within[:, 6] = (within[:, 6] + 1) % (V - 1)
    assert (objective.rewards(model, within, batch.counted_BT) != got).all()


def test_it_begins_at_one_bit_per_pair_and_its_loss_is_bradley_and_terrys():
    objective = RewardModel(V, EOT, margin=0.3, centring=0.02)
    fresh = model_for(RewardModel(V, EOT))
    with torch.no_grad():
        fresh.score.weight.zero_()
    nats = RewardModel(V, EOT).evaluate(fresh, answers(), generator()).nats_B
    assert nats[0::2].tolist() == pytest.approx([math.log(2)] * 3) and nats[1::2].tolist() == [0.0] * 3
    model, batch = scored(objective), answers()
    reward = objective.rewards(model, batch.tokens_BT, batch.counted_BT)
    h, both = reward[0::2] - reward[1::2], reward[0::2] + reward[1::2]
    wanted = torch.log1p(torch.exp(-(h - 0.3))).mean() + 0.02 * both.square().mean()
    torch.testing.assert_close(objective.loss(model, batch, generator()), wanted)
    assert objective.telemetry()["preference_accuracy"] == (h > 0).double().mean()


@pytest.mark.thorough
def test_it_learns_which_answers_were_preferred_and_then_says_so_of_new_ones():
    torch.manual_seed(0)
    objective = RewardModel(V, EOT)
    model = model_for(objective, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def batch(seed):
        """The answer with more of token 3 is preferred."""
        batch = answers(64)
        tokens = torch.randint(6, batch.tokens_BT.shape, generator=generator(seed))
        count = ((tokens == 3) & batch.counted_BT).sum(1)
        best = torch.stack([count[0::2] > count[1::2], count[0::2] < count[1::2]], 1)
        differ = best.any(1)
        pairs = tokens.view(-1, 2, T)[differ]
        swapped = torch.where(best[differ][:, :1, None], pairs, pairs.flip(1))
        return replace(batch, tokens_BT=swapped.reshape(-1, T), weights_BT=batch.weights_BT[: 2 * len(pairs)])

    for step in range(120):
        loss = objective.loss(model, batch(step), generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    objective.loss(model, batch(999), generator())
    assert objective.telemetry()["preference_accuracy"] > 0.9
    reward = LearntReward(Trained(model, objective))
    new = batch(1000)
    given = reward(new.tokens_BT, new.counted_BT)
    assert given.dtype == torch.float64 and (given[0::2] > given[1::2]).double().mean() > 0.9 and reward.flops(T) > 0


def test_what_gives_no_rewards_or_writes_no_text_is_refused():
    with pytest.raises(ValueError, match="a run of NextToken gives no rewards: give one of objective=reward_model"):
        LearntReward(Trained(None, NextToken(V, EOT)))
    objective = RewardModel(V, EOT)
    with pytest.raises(ValueError, match="a reward model reads text and writes none"):
        objective.denoiser(None)
    with pytest.raises(ValueError, match="windows of chosen and rejected answers in turn"):
        objective.loss(None, answers(3), generator())
    with pytest.raises(ValueError, match="centring=-1 must not be negative"):
        RewardModel(V, EOT, centring=-1)
    with pytest.raises(ValueError, match="the model has no scores: build it with the objective's options"):
        model_for(NextToken(V, EOT)).scores(torch.zeros(1, 32).double())
