"""A run whose loss has spiked goes back to an earlier state where that is asked for, and on with other batches."""

import math

import pytest
import torch

from experiments.harness import rewinding
from experiments.harness.assembly import prepare_run
from experiments.harness.parts import open_data
from experiments.harness.rewinding import LASTING, LEAST, MOST, Rewinding
from experiments.harness.run import execute
from experiments.harness.training_module import TrainingModule

ON = "+trainer.rewind_spikes=6"
RUINED = 11  # the step that ruins the weights, counted from 0
UNDONE = [[8, 13]]  # the losses of two more say so, and a state was kept before the ninth step and the thirteenth


class Trial:
    """A model of one weight, which is the number of steps it has taken, and its momentum."""

    def __init__(self, deviations=4.0):
        self.told, self.model = Rewinding(deviations), torch.nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=1e-9)
        torch.nn.init.zeros_(self.model.weight)

    def take(self, steps, losses):
        for step, loss in zip(steps, losses, strict=True):
            self.model.weight.grad = -torch.ones(1, 1)
            self.optimizer.step()
            self.told.after(step, loss, self.model, self.optimizer)

    @property
    def taken(self):
        return round(self.model.weight.item())


def calm(steps):
    return [2.0 + 0.1 * math.sin(step) for step in steps]


def test_it_goes_back_when_the_loss_has_stayed_high_and_to_the_older_of_two_states():
    trial = Trial()
    trial.take(range(130), calm(range(130)))
    trial.take(range(130, 130 + LASTING - 1), [9.0] * (LASTING - 1))
    assert trial.taken == 130 + LASTING - 1 and trial.told.undone == []
    trial.take([133], [9.0])
    assert trial.taken == 50 and trial.told.undone == [[50, 133]]
    trial.take([134], [2.0])
    assert trial.taken == 51


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([9.0] * (LASTING - 1) + [2.0] + [9.0] * (LASTING - 1), "between the high ones lies a low one"),
        ([2.3] * 50, "they are within the deviations"),
        ([0.0] * 50, "they are low"),
    ],
)
def test_it_stays_where(losses, why):
    trial = Trial()
    trial.take(range(130), calm(range(130)))
    trial.take(range(130, 130 + len(losses)), losses)
    assert trial.told.undone == [], why


@pytest.mark.parametrize("before", [LEAST - 1, LEAST + 1])
def test_before_there_are_losses_to_compare_with_and_a_state_a_rise_is_taken_as_it_is(before):
    trial = Trial()
    trial.take(range(before), calm(range(before)))
    trial.take(range(before, 200), [9.0 + loss for loss in calm(range(before, 200))])
    assert trial.told.undone == [] and trial.taken == 200
    assert [state["steps"] for state in trial.told.states] == [150, 200]


def test_a_loss_that_stays_high_is_no_spike_for_ever():
    trial = Trial()
    trial.take(range(60), calm(range(60)))
    trial.take(range(60, 1000), [9.0 + loss for loss in calm(range(60, 1000))])
    assert len(trial.told.undone) == MOST and {first for first, _ in trial.told.undone} == {50}
    assert trial.taken == 50 + 999 - trial.told.undone[-1][1]


def test_the_rate_goes_on_by_the_schedule_while_the_momentum_goes_back():
    trial = Trial()
    trial.take(range(100), calm(range(100)))
    momentum = trial.told.states[0]["moments"][0]["momentum_buffer"].clone()
    trial.optimizer.param_groups[0]["lr"] = 0.5
    trial.take(range(100, 100 + LASTING), [9.0] * LASTING)
    assert trial.optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(trial.optimizer.state[trial.model.weight]["momentum_buffer"], momentum)


@pytest.fixture
def planted(monkeypatch):
    """States every four steps, a spike after two high losses, and a head that the twelfth step ruins. Returns what was
    there: the batch of each step, and weights and moments after it."""
    take, read, seen = TrainingModule.optimizer_step, TrainingModule.training_step, ({}, {})
    for name, value in (("EVERY", 4), ("LASTING", 2), ("LEAST", 4)):
        monkeypatch.setattr(rewinding, name, value)

    def training_step(self, batch, batch_idx):
        seen[0][self.global_step] = batch.tokens_BT
        return read(self, batch, batch_idx)

    def optimizer_step(self, *args, **kwargs):
        take(self, *args, **kwargs)
        weights = self.model.state_dict().values()
        moments = [x for state in self.trainer.optimizers[0].state.values() for x in state.values()]
        seen[1][self.global_step] = torch.cat([torch.as_tensor(x).flatten().float() for x in (*weights, *moments)])
        if self.global_step == RUINED:
            generator = torch.Generator().manual_seed(0)
            self.model.head.weight.data += 10 * torch.randn(self.model.head.weight.shape, generator=generator)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    return seen


# Of masked diffusion a seed whose masks do not look like a spike to the few losses that are compared here.
@pytest.mark.parametrize(
    "settings", [(), ("optim=muon",), ("arch=qwen3_moe",), ("objective=masked_diffusion", "seed=2")]
)
def test_a_run_goes_back_bit_for_bit_and_on_with_batches_that_it_has_not_seen(make_run, data, planted, settings):
    row = execute(make_run(ON, *settings), data)
    batches, states = planted
    assert row["status"] == "done" and row["undone_steps"] == UNDONE
    assert torch.equal(states[UNDONE[0][1]], states[UNDONE[0][0] - 1])
    assert not torch.equal(states[UNDONE[0][1]], states[UNDONE[0][0]])
    assert len(batches) == row["steps"] > RUINED + 4
    windows = [tuple(window) for batch in batches.values() for window in batch.tolist()]
    assert len(set(windows)) == len(windows)


def test_it_costs_no_step_more_and_ends_where_the_loss_is_low_again(make_run, data, planted):
    rows = [execute(make_run(*settings), data) for settings in ((), (ON,))]
    assert len({(row["flops"], row["steps"], row["tokens"]) for row in rows}) == 1
    assert rows[1]["bits_per_byte"] < rows[0]["bits_per_byte"]
    assert rows[0]["undone_steps"] is None


@pytest.mark.parametrize("step", [6, RUINED + 2, RUINED + 5])
def test_a_run_that_goes_on_goes_back_as_one_that_was_not_stopped(make_run, data, planted, killed_at, tmp_path, step):
    whole = execute(make_run(ON), data)
    run = make_run(ON, f"session.root={tmp_path / 'again'}", "session.checkpoint_seconds=0")
    with killed_at(step):
        execute(run, data)
    row = execute(run, data)
    assert row["undone_steps"] == UNDONE
    assert [row[name] for name in ("bits_per_byte", "train_loss")] == [
        whole[name] for name in ("bits_per_byte", "train_loss")
    ]


def test_a_run_without_spikes_is_the_same_to_the_bit(make_run, data):
    rows = [execute(make_run(*settings), data) for settings in ((), (ON,))]
    assert rows[0]["bits_per_byte"] == rows[1]["bits_per_byte"] and rows[1]["undone_steps"] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("+trainer.rewind_spikes=0",), "trainer.rewind_spikes=0.* must be above 0, or null"),
        ((ON, "arch=qwen3_moe", "trainer.experts=2", "trainer.devices=2"), "rewind_spikes=6.* take experts=1"),
        (
            (ON, "data=countdown", "objective=grpo"),
            "rewind_spikes=6.* is of pre-training, not of objective=next_token.grpo",
        ),
    ],
)
def test_what_it_cannot_serve_is_refused(make_run, data, settings, words):
    with pytest.raises(ValueError, match=words):
        run = make_run(*settings)
        prepare_run(run, open_data(run.config) if "countdown" in str(settings) else data)
