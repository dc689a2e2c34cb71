"""Optimisers: what each does to a parameter, how its rate is transferred across widths, and what its steps cost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from archs.parameters import Role, RoleParameter
from experiments.harness.optimisers import AdamW, Muon, orthogonalised
from experiments.harness.schedules import ConstantThenDecay, Cosine, Linear, scheduled

OPTIMISERS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "optim").glob("*.yaml"))
MUON = Muon(0.01, 64, 1e6, 0.0, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.1)
ADAMW = AdamW(0.01, 64, 1e6, 0.0, betas=(0.9, 0.95), weight_decay=0.1)
every = pytest.mark.parametrize("name", OPTIMISERS)


def build(make_config, name, width, *overrides):
    config = make_config(f"arch.width={width}", f"optim={name}", *overrides)
    torch.manual_seed(0)
    model = instantiate(config.arch.model, vocab_size=17)
    optimiser = instantiate(config.optim)
    return model, optimiser, optimiser.build(model.roles(), model.width, 1_000_000)


@every
@pytest.mark.parametrize("tied", ["true", "false"])
def test_every_parameter_is_in_one_group_and_only_matrices_are_decayed(make_config, name, tied):
    model, optimiser, built = build(make_config, name, 32, "arch=qwen3_next", f"arch.model.tied={tied}")
    groups = {id(p): group for group in built.param_groups for p in group["params"]}
    assert len(groups) == sum(len(g["params"]) for g in built.param_groups) == len(list(model.parameters()))
    for role in model.roles():
        group = groups[id(role.parameter)]
        assert (group["weight_decay"] > 0) == (role.role is Role.MATRIX)
        if role.role in (Role.EMBEDDING, Role.VECTOR):
            assert group["lr"] == optimiser.learning_rate


@pytest.mark.thorough
@every
def test_a_step_changes_the_output_by_about_as_much_at_any_width(make_config, name):
    """What a transfer rule promises: after a few updates the logits have moved by an amount that does not grow."""
    moved = []
    for width in (32, 256):
        model, _, built = build(make_config, name, width, "arch.model.depth=4")
        x = torch.randint(17, (4, 32), generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            built.zero_grad()
            torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
            built.step()
        moved.append(model(x).std().item())
    assert 0.4 < moved[1] / moved[0] < 2.5


@every
def test_every_rate_goes_with_the_length_of_the_run_by_its_exponent(make_config, name):
    model, optimiser, built = build(make_config, name, 32, "optim.length_exponent=0.3")
    longer = optimiser.build(model.roles(), model.width, 8_000_000)
    for group, other in zip(built.param_groups, longer.param_groups, strict=True):
        assert other["lr"] == pytest.approx(group["lr"] * 8**-0.3)


def role_of(shape, role):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    return RoleParameter("x", parameter, role, shape[-1])


def stepped(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_a_matrix_moves_under_muon_as_under_pytorchs(shape):
    """torch.optim.Muon orthogonalises in bfloat16; ours does on a GPU alone."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    ours, theirs = role_of(shape, Role.MATRIX), role_of(shape, Role.MATRIX)
    start = ours.parameter.detach().clone()
    built = MUON.build([ours], 64, 1)
    plain = torch.optim.Muon(
        [theirs.parameter], lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    a, b = stepped(built, ours.parameter, gradients), stepped(plain, theirs.parameter, gradients)
    assert (a - b).norm() < 0.02 * (b - start).norm()


def test_everything_else_moves_under_muon_as_under_adamw():
    generator = torch.Generator().manual_seed(1)
    for role, width in ((Role.HEAD, 32), (Role.EMBEDDING, 32), (Role.VECTOR, 32)):
        gradients = [torch.randn(5, 7, generator=generator) for _ in range(4)]
        moved = []
        for optimiser in (MUON, ADAMW):
            mine = role_of((5, 7), role)
            moved.append(stepped(optimiser.build([mine], width, 1), mine.parameter, gradients))
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-7)


def test_the_experts_of_a_layer_are_orthogonalised_one_by_one():
    update = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    stacked = orthogonalised(update)
    for one, alone in zip(stacked, update, strict=True):
        torch.testing.assert_close(one, orthogonalised(alone))
        assert ((torch.linalg.svdvals(one) > 0.5) & (torch.linalg.svdvals(one) < 1.3)).all()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 6, 10)])
def test_the_flops_of_a_step_are_those_that_pytorch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalised(torch.randn(shape))
    assert MUON.flops([role_of(shape, Role.MATRIX)]) == counter.get_total_flops()
    assert MUON.flops([role_of(shape, Role.EMBEDDING)]) == 0
    assert ADAMW.flops([role_of(shape, Role.MATRIX)]) == 0


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    "schedule", [Linear(0.1), Cosine(0.1, 0.1), ConstantThenDecay(0.1, 0.2), Linear(0.0)], ids=lambda s: str(s)
)
def test_every_schedule_stays_between_zero_and_the_rate(schedule, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    following, rates = scheduled(optimizer, schedule, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        following.step()
    assert all(0 < rate <= 0.01 for rate in rates)
    if steps == 1000:
        assert max(rates) == pytest.approx(0.01, rel=0.01)
        last = {Cosine: 0.001}.get(type(schedule), 0.01 * 0.0005 / {ConstantThenDecay: 0.2}.get(type(schedule), 0.9))
        last = 0.01 * 0.0005 if schedule == Linear(0.0) else last
        assert rates[-1] == pytest.approx(last, rel=1e-3)
        if isinstance(schedule, ConstantThenDecay):
            assert rates[150] == rates[790] == 0.01 > rates[810]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(ADAMW, learning_rate=0), "optim.learning_rate=0 must be above 0"),
        (lambda: replace(MUON, base_width=0), "optim.base_width=0 must be above 0"),
        (lambda: replace(ADAMW, base_tokens=-1.0), "optim.base_tokens=-1.0 must be above 0"),
        (lambda: Linear(1.0), "schedule.warmup=1.0 must be a fraction of the run, at least 0 and below 1"),
        (lambda: Cosine(0.1, -0.1), "schedule.floor=-0.1 must be a fraction"),
        (lambda: ConstantThenDecay(0.3, 0.8), "schedule.decay=0.8 must be above 0 and at most 1 - warmup=0.7"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
