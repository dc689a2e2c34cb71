"""What keeps experts evenly used: biases of the choice, losses of the router, and the figures that show it."""

import math

import pytest
import torch

from tests.archs.mixtures import DEEPSEEK, build, naive, tokens


def skewed(**options):
    """A mixture and tokens that nearly all prefer expert 0."""
    moe, x = build(std=0.1, **options), 1 + tokens(B=4, T=64)
    with torch.no_grad():
        moe.router.linear.weight[0] += 0.15
    return moe, x


@pytest.mark.thorough
# The rate is to be well under the differences between scores, or the biases circle around the even load.
@pytest.mark.parametrize(("gate", "rate"), [("softmax", 0.001), ("sigmoid", 0.003)])
def test_choice_biases_even_out_a_skewed_router_and_get_no_gradient(gate, rate):
    moe, x = skewed(gate=gate, bias_update_rate=rate)
    moe.router.choice_bias.zero_()
    loads = []
    for _ in range(300):
        moe(x).sum().backward()
        loads.append(moe.telemetry()["expert_load"])
        moe.after_step()
    assert loads[0] > 2 and loads[-1] < 1.2
    assert not moe.router.choice_bias.requires_grad and moe.router.choice_bias.grad is None


def test_one_update_moves_each_bias_by_the_rate_towards_the_even_load():
    moe = build(bias_update_rate=0.5)
    moe.router.choice_bias.mul_(0.01)
    bias = moe.router.choice_bias.clone()
    passes = [moe.router(tokens(T=T, seed=T).flatten(0, 1))[2] for T in (30, 3)]  # two forward passes, one step
    moe.eval()(tokens(T=100))  # not counted
    moe.after_step()
    direction, last = (torch.sign(loads.double().mean() - loads) for loads in (sum(passes), passes[-1]))
    assert (direction != last).any()
    torch.testing.assert_close(moe.router.choice_bias, bias + 0.5 * direction)
    moe.after_step()  # nothing was routed since
    torch.testing.assert_close(moe.router.choice_bias, bias + 0.5 * direction)


def test_loads_are_summed_over_processes_before_the_biases_move(monkeypatch):
    moe = build(bias_update_rate=0.5)
    moe.router.choice_bias.zero_()
    moe(tokens())
    other = torch.tensor([0] * 7 + [1000])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda loads: loads.add_(other))
    moe.after_step()
    assert moe.router.choice_bias.tolist() == [0.5] * 7 + [-0.5]


def test_choice_biases_are_part_of_the_saved_state():
    moe, other = build(**DEEPSEEK), build(**DEEPSEEK)
    other.router.choice_bias.zero_()
    other.load_state_dict(moe.state_dict())
    assert (other.router.choice_bias == moe.router.choice_bias).all() and moe.router.choice_bias.any()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_balance_loss_is_its_coefficient_at_uniform_routing_and_larger_at_skewed(gate):
    moe = build(gate=gate, balance_loss=0.3)
    moe(tokens())
    assert moe.auxiliary_losses()["balance"].item() > 0.301
    moe.router.linear.weight.data.zero_()
    moe(tokens())
    assert moe.auxiliary_losses()["balance"].item() == pytest.approx(0.3)


def test_the_balance_loss_is_the_published_formula():
    moe, x = build(balance_loss=0.3), tokens()
    moe(x)
    scores = (x.flatten(0, 1) @ moe.router.linear.weight.T).softmax(-1)
    _, choices = naive(moe, x)
    fraction = torch.tensor([sum(e in chosen for chosen in choices) / (3 * len(choices)) for e in range(8)])
    expected = 0.3 * 8 * (fraction * scores.mean(0)).sum()
    torch.testing.assert_close(moe.auxiliary_losses()["balance"], expected)


def test_the_gradient_of_the_balance_loss_evens_out_the_load():
    moe, x = skewed(balance_loss=1.0)
    optimiser = torch.optim.Adam(moe.router.parameters(), lr=0.03)
    loads = []
    for _ in range(60):
        moe(x)
        loads.append(moe.telemetry()["expert_load"])
        optimiser.zero_grad()
        moe.auxiliary_losses()["balance"].backward()
        optimiser.step()
    assert loads[0] > 2 and loads[-1] < 1.3


def test_the_z_loss_is_the_mean_square_of_the_log_normaliser():
    moe, x = build(z_loss=0.2), tokens()
    moe(x)
    logits = x @ moe.router.linear.weight.T
    expected = 0.2 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(moe.auxiliary_losses()["router_z"], expected)
    moe.auxiliary_losses()["router_z"].backward()
    assert moe.router.linear.weight.grad.abs().sum() > 0


def test_losses_are_there_only_in_training_and_only_where_asked_for():
    moe = build(balance_loss=0.1, z_loss=0.1)
    moe(tokens())
    assert set(moe.auxiliary_losses()) == {"balance", "router_z"}
    moe.eval()(tokens())
    assert moe.auxiliary_losses() == {}
    plain = build()
    plain(tokens())
    assert plain.auxiliary_losses() == {}


def skew(moe):
    """Every token to experts 0, 1 and 2."""
    with torch.no_grad():
        moe.router.linear.weight.zero_()
        moe.router.linear.bias.copy_(-50.0 * torch.arange(8))


def test_all_tokens_to_the_same_experts_are_all_computed_and_the_rest_get_zero_gradients():
    moe, x = build(bias=True), tokens()
    skew(moe)
    y = moe(x)
    torch.testing.assert_close(y, naive(moe, x)[0])
    y.square().sum().backward()
    grads = moe.out_proj.weight.grad.abs().sum((1, 2))
    assert grads[0] > 0 and (grads[3:] == 0).all()
    figures = moe.telemetry()
    assert figures["expert_load"] == pytest.approx(8 / 3) and figures["dead_experts"] == 5 / 8
    assert figures["router_entropy"] == pytest.approx(0, abs=1e-12)


def test_telemetry_is_of_the_last_training_forward():
    moe = build()
    assert moe.telemetry() == {}
    moe.router.linear.weight.data.zero_()
    moe(tokens())
    figures = moe.telemetry()
    assert figures["router_entropy"] == pytest.approx(math.log(8)) and figures["dropped_tokens"] == 0
    moe.router.linear.weight.data.normal_()
    moe.eval()(tokens(T=100))
    assert moe.telemetry() == figures
