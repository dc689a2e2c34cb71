"""Diffusion policies that can be enumerated: the expected gradient by each likelihood against the exact one."""

import pytest
import torch

from experiments.enumeration import (
    DRAWN_IN,
    MASK,
    ORDERS,
    SEQUENCES,
    WRITTEN,
    L,
    Table,
    V,
    bound_gradient,
    cosine,
    generator,
    log_p_by_order,
    policy_gradient,
    reward_gradient,
    rewards,
)
from experiments.gradient_angles import angles, ascend, coherent, figure, measured
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch
from objectives.decoding.unmasking import Ancestral, Ordered, Threshold
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.post_training.sampled_likelihood import Bound, Coupled, Exact, OneStep, Trajectory
from objectives.uniform_diffusion import UniformDiffusion
from tests.objectives.exact import Past, request

BASE = MaskedDiffusion(vocab_size=V, eot=0)


@pytest.mark.parametrize("spread", [0.5, 1.0, 4.0])
def test_the_gradient_by_the_trajectory_is_that_of_the_expected_reward(spread):
    model, reward = Table(causal=False, spread=spread), rewards()
    got = policy_gradient(Trajectory(), BASE, model, reward)
    torch.testing.assert_close(got, reward_gradient(model, reward), rtol=1e-10, atol=1e-12)


def test_every_way_of_writing_every_sequence_is_there_once():
    log_p = log_p_by_order(Table(causal=False))
    assert log_p.shape == (27, 6) and log_p.exp().sum(0).tolist() == pytest.approx([1.0] * 6)
    assert len(torch.cat([WRITTEN, DRAWN_IN], 1).unique(dim=0)) == 27 * 6 and len(ORDERS) == 6


def test_the_trajectory_of_one_pass_is_one_step_and_that_of_several_tokens_at_once_is_exact_too():
    model, all_at_once = Table(causal=False), torch.zeros_like(SEQUENCES)
    batch = Batch(SEQUENCES, torch.ones(SEQUENCES.shape), extras={"order": all_at_once})
    parts = [x.log_probs(BASE, model, batch, generator()) for x in (Trajectory(), OneStep())]
    torch.testing.assert_close(*parts)
    assert parts[0].sum(1).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("sampler", [Ordered("random", None), Ordered("random", 2), Ancestral(2), Threshold(0.5)])
@pytest.mark.parametrize("base", [BASE, BlockDiffusion(V, 0, 2)], ids=["masked", "blocks"])
def test_a_replay_gives_each_token_the_probability_that_it_was_drawn_with(base, sampler):
    model = Table(causal=False) if base is BASE else Blocks()
    prompt = torch.tensor([1])
    samples = base.sample(model, request([prompt, prompt[:0]], L, copies=20), sampler)
    drawn = samples.order_BT >= 0
    batch = Batch(samples.tokens_BT, drawn.double(), extras={"order": samples.order_BT})
    got = Trajectory().log_probs(base, model, batch, generator())
    torch.testing.assert_close(got.detach(), samples.log_probs_BT)
    assert drawn.sum(1).tolist() == [2] * 20 + [3] * 20


class Blocks(Table):
    """A table for blocks: the noised half sees its own block and the clean one before, as `BlockDiffusion` asks."""

    def __init__(self):
        super().__init__(causal=False)

    def hidden(self, tokens_BT, visibility=None, time=None):
        noised, clean = tokens_BT[:, :L], tokens_BT[:, L:]
        first = super().hidden(torch.cat([noised[:, :2], torch.full_like(noised[:, 2:], MASK)], 1))[:, :2]
        second = super().hidden(torch.cat([clean[:, :2], noised[:, 2:]], 1))[:, 2:]
        return torch.cat([first, second, torch.zeros(len(clean), L, V).double()], 1)

    def empty_states(self, batch):
        return [Past(torch.zeros(batch, 0, dtype=torch.long))]

    def extend(self, tokens_BT, states, visibility, time=None):
        seen, before = torch.cat([states[0].tokens, tokens_BT], 1), states[0].length
        whole = torch.nn.functional.pad(seen, (0, L - seen.shape[1]), value=MASK)
        return Table.hidden(self, whole)[:, before : seen.shape[1]], [Past(seen)]


@pytest.mark.parametrize("base", [NextToken(V, 0), UniformDiffusion(V, 0)], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("likelihood", [Trajectory(), Bound(), Coupled(), OneStep()], ids=lambda x: type(x).__name__)
def test_what_a_base_does_not_have_is_refused(likelihood, base):
    message = f"likelihood={type(likelihood).__name__} cannot be read from {type(base).__name__}, only from"
    with pytest.raises(ValueError, match=message):
        likelihood.check(base)
    Exact().check(NextToken(V, 0))


def test_estimates_of_the_bound_have_its_gradient():
    model, reward = Table(causal=False, spread=0.5), rewards()
    got = policy_gradient(Bound(draws=2), BASE, model, reward, draws=1000)
    assert cosine(got, bound_gradient(model, reward)) > 0.99


@pytest.mark.thorough
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_a_likelihood_further_from_the_trajectory_has_a_gradient_further_from_the_truth(spread):
    """Policies whose orders disagree; in the mean of eight."""
    found = [angles(Table(False, spread, seed), rewards(seed=100 + seed)) for seed in range(8)]
    mean = {name: sum(row[name] for row in found) / 8 for name in found[0]}
    assert mean["trajectory"] > 1 - 1e-9 and mean["gap"] > 0
    assert mean["bound"] < 0.95 and mean["bound"] > mean["coupled"] > mean["one_step"]


def test_where_all_orders_agree_the_bound_is_exact_and_learning_makes_them_disagree():
    model, reward = coherent(1.0, 0), rewards()
    orders = log_p_by_order(model).detach()
    torch.testing.assert_close(orders, orders[:, :1].expand(-1, 6))
    before = angles(model, reward)
    after = angles(ascend(model, reward, 8), reward)
    assert before["bound"] > 1 - 1e-6 and abs(before["gap"]) < 1e-9 and before["one_step"] < 0.9
    assert after["trajectory"] > 1 - 1e-9 and after["bound"] < before["bound"] and after["gap"] > 1e-3


@pytest.mark.thorough
def test_the_table_of_angles_has_a_row_per_kind_of_policy_and_a_picture(tmp_path):
    table = measured(policies=1)
    assert table.policy.value_counts().to_dict() == {"random logits": 4, "after ascent": 4}
    figure(table).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
