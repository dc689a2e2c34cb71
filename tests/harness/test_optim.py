"""The learning rate transfers across width and follows the run's own length."""

import pytest
import torch
from hydra.utils import instantiate

from experiments.harness.optim import adamw, warmup_then_linear


def build(make_config, width, *overrides):
    model = instantiate(make_config(f"arch.width={width}", *overrides).arch.model, vocab_size=17)
    return model, adamw(model, learning_rate=0.01, base_width=64, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_every_parameter_is_in_one_group_and_only_matrices_scale_with_width(make_config, tied):
    for width in (16, 64):
        model, optimizer = build(make_config, width, "arch=gated_delta_hybrid", f"arch.model.tied={tied}")
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert (
            len(rate) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        )
        assert rate[id(model.embedding.weight)] == 0.01
        assert rate[id(model.blocks[0].mixer.A_log)] == 0.01
        assert rate[id(model.blocks[0].channel.gate_up.weight)] == pytest.approx(0.01 * 64 / width)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_schedule_rises_over_a_tenth_and_falls_to_zero_at_the_end(make_config, steps):
    _, optimizer = build(make_config, 64)
    schedule = warmup_then_linear(optimizer, steps, warmup=0.1)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 0.01 for rate in rates)
    assert rates[-1] <= 0.01 * 0.5 / (0.9 * steps) * (1 + 1e-9)  # half a step before zero
    if steps == 1000:
        assert max(range(steps), key=rates.__getitem__) in (99, 100)
        assert rates[-1] == pytest.approx(0.01 * 0.0005 / 0.9)


def test_a_step_changes_the_output_by_about_as_much_at_any_width(make_config):
    """What muP promises: after a few updates the logits have moved by an amount that does not grow with width."""
    moved = []
    for width in (32, 256):
        torch.manual_seed(0)
        model, optimizer = build(make_config, width, "arch.model.depth=4")
        x = torch.randint(17, (4, 32))
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
            optimizer.step()
        moved.append(model(x).std().item())
    assert 0.4 < moved[1] / moved[0] < 2.5
