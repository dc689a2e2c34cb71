"""The duties of every objective that tunes another, found by its config, on every likelihood that it can tune."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from experiments.harness.parts import build
from objectives.contracts import Batch
from objectives.decoding.unmasking import Ordered
from objectives.post_training.policy_gradient import PolicyGradient
from objectives.post_training.tuning import Reward, Trained, Tuning
from tests.contracts.discovery import LENGTH, composed, likelihoods, names
from tests.contracts.test_objectives import EOT, V, generator, model_for
from tests.contracts.test_objectives import build as likelihood

TUNINGS = [name for name in names("objective") if name not in likelihoods()]
PAIRS = [(tuning, base) for tuning in TUNINGS for base in likelihoods()]
every = pytest.mark.parametrize(("tuning", "base"), PAIRS)


class Evens(Reward):
    """The fraction of an answer's tokens that are even."""

    def __call__(self, tokens_BT, drawn_BT):
        return ((tokens_BT % 2 == 0) & drawn_BT).sum(1).double() / drawn_BT.sum(1).clamp(min=1)

    def flops(self, T):
        return 0.0


def build_tuning(tuning, base, *overrides):
    """The objective, or None where it does not know this likelihood."""
    node = composed(f"objective={tuning}", *(f"objective.build.{o}" for o in overrides)).objective
    if "base" not in node:
        return build(node.build, vocab_size=V, eot=EOT)
    given, keys = {}, OmegaConf.to_container(node, resolve=False).get("models", {})
    if "reward" in keys:
        given["reward"] = Evens()
    if "teacher" in keys:
        given["teacher"] = Trained(
            model_for(likelihood(base), "gated_delta_hybrid" if exact(base) else "transformer"), likelihood(base)
        )
    try:
        return build(node.build, _partial_=True)(base=likelihood(base), eot=EOT, **given)
    except ValueError as error:
        assert "cannot be read from" in str(error)
        return None


def exact(base):
    return base in ("next_token", "multi_token")


def questions(B=4):
    """Prompts of 20 and of 19 tokens by turns, so that every window's answer is learnt."""
    tokens = torch.randint(V - 1, (B, LENGTH), generator=generator(1))
    weights = torch.zeros(B, LENGTH)
    weights[0::2, 20:], weights[1::2, 19:] = 1.0, 1.0
    return Batch(tokens, weights)


@every
def test_it_learns_from_what_its_model_writes_or_is_given_and_all_chance_is_the_generators(tuning, base):
    objective = build_tuning(tuning, base)
    if objective is None:
        return
    model = model_for(objective)
    objective.check(model, LENGTH)
    for beside in objective.begin(model):
        assert not any(p.requires_grad for p in beside.parameters())
    losses = []
    for _ in range(2):
        torch.manual_seed(len(losses))
        experience = objective.experience(model, questions(), generator())
        assert model.training and not any(x.requires_grad for x in experience.extras.values())
        losses.append(objective.loss(model, experience, generator()))
    assert losses[0] == losses[1] and losses[0].shape == () and losses[0].isfinite()
    losses[0].backward()
    assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0
    assert all(isinstance(figure, float) for figure in objective.telemetry().values())


@every
def test_it_costs_more_than_its_base_and_says_so(tuning, base):
    objective = build_tuning(tuning, base)
    if isinstance(objective, Tuning):
        model = model_for(objective)
        counted = (LENGTH - 20) / LENGTH
        least = objective.base.training_flops(model, LENGTH, counted)
        more = objective.training_flops(model, LENGTH, counted)
        assert more == least if tuning in ("simpo", "wiring") else more > least
        assert objective.evaluate(model, questions(), generator()).nats_B.equal(
            objective.base.evaluate(model, questions(), generator()).nats_B
        )


def test_every_likelihood_but_that_of_uniform_noise_learns_from_rewards_and_every_one_from_pairs():
    able = {base for tuning, base in PAIRS if "grpo" in tuning and build_tuning(tuning, base) is not None}
    assert able == set(likelihoods()) - {"uniform_diffusion"}
    assert all(build_tuning("dpo", base) is not None for base in likelihoods())


@pytest.mark.parametrize("tuning", ["grpo", "diffusion_grpo"])
def test_the_flops_of_an_experience_and_a_step_are_those_that_run(tuning):
    base = "next_token" if tuning == "grpo" else "masked_diffusion"
    objective = build_tuning(tuning, base, "group=4")
    assert isinstance(objective, PolicyGradient)
    model = model_for(objective, dtype=torch.float32)
    objective.eot = V + 5  # nothing ends an answer early
    if tuning == "diffusion_grpo":
        objective.sampler = Ordered("random", None)
    batch = questions(8)
    batch = replace(batch, weights_BT=batch.weights_BT[0].expand(8, -1))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        experience = objective.experience(model, batch, generator())
        objective.loss(model, experience, generator()).backward()
    run = counter.get_total_flops() / len(batch.tokens_BT)
    planned = objective.training_flops(model, LENGTH, (LENGTH - 20) / LENGTH)
    # Pairs that are not seen run all the same here, and a cache is padded; a tenth in all at this size.
    assert planned == pytest.approx(run, rel=0.1)


@every
def test_the_losses_of_the_parts_of_an_experience_sum_to_its_loss_and_what_a_part_holds_draws_nothing(tuning, base):
    objective = build_tuning(tuning, base)
    if objective is None:
        return
    model = model_for(objective)
    objective.begin(model)
    whole = objective.experience(model, questions(8), generator())
    with torch.no_grad():
        model.head.weight.mul_(1.1)  # no longer the model that wrote, and that it is compared with
    loss = objective.loss(model, whole, generator(3))
    noised = replace(whole, noise=objective.noise(whole, generator(3)))
    rows = (slice(0, 2), slice(2, 6), slice(6, len(whole.tokens_BT)))
    parts = [objective.loss(model, noised.part(part), generator(9)) for part in rows]
    torch.testing.assert_close(sum(parts), loss)


@pytest.mark.parametrize("name", ["Bound", "Coupled", "OneStep", "Trajectory"])
def test_the_likelihoods_of_the_parts_of_what_was_written_are_those_of_the_whole(name):
    likelihood_of = f"likelihood._target_=objectives.post_training.sampled_likelihood.{name}"
    objective = build_tuning("diffusion_grpo", "masked_diffusion", likelihood_of)
    assert isinstance(objective, PolicyGradient)
    model = model_for(objective)
    whole = objective.experience(model, questions(), generator())
    noised = replace(whole, noise=objective.noise(whole, generator(3)))
    parts = [objective._log_probs(model, noised.part(rows)) for rows in (slice(0, 3), slice(3, len(whole.tokens_BT)))]
    torch.testing.assert_close(torch.cat(parts), objective._log_probs(model, whole))


def test_a_part_of_which_nothing_counts_has_a_gradient_for_every_weight_as_other_processes_wait_for():
    objective = build_tuning("diffusion_grpo", "masked_diffusion")
    assert isinstance(objective, PolicyGradient)
    model = model_for(objective, "gated_delta_hybrid")
    whole = objective.experience(model, questions(), generator())
    none = replace(whole, weights_BT=torch.zeros_like(whole.weights_BT), noise={}).part(slice(0, 2))
    objective.loss(model, none, generator()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
