"""Steps whose gradient is far above those before it are left out where that is asked for, and each is in the row."""

import math

import pytest
import torch

from experiments.harness import spikes, training_module
from experiments.harness.run import execute
from experiments.harness.spikes import LEAST, MOST_IN_A_ROW, Spikes
from experiments.harness.telemetry import Telemetry


@pytest.mark.parametrize(("norm", "spike"), [(4.9, False), (5.1, True), (math.inf, True), (math.nan, True)])
def test_a_norm_is_a_spike_beyond_the_factor_of_the_median_before_it(norm, spike):
    told = Spikes(5.0)
    for step in range(LEAST):
        assert not told.at(step, 100.0 if step % 3 == 0 else 1.0)
    assert told.at(LEAST, norm) == spike
    assert told.steps == ([LEAST] if spike else [])


def test_nothing_is_a_spike_before_there_are_norms_to_compare_with():
    told = Spikes(2.0)
    assert not any(told.at(step, 10.0**step) for step in range(LEAST))


def test_a_norm_that_stays_high_is_no_spike_for_ever():
    told = Spikes(2.0)
    skipped = [told.at(step, 1.0 if step < LEAST else 10.0) for step in range(LEAST + 100)]
    assert skipped == [False] * LEAST + [True] * MOST_IN_A_ROW + [False] * (100 - MOST_IN_A_ROW)


@pytest.fixture
def spike_at_7(monkeypatch):
    """A loss a thousand times as steep in the eighth step, and what a weight is after each step."""
    original, weights = training_module.TrainingModule.training_step, {}

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return 1000 * loss if self.global_step == 7 else loss

    def note(self, trainer, module, *rest, end=Telemetry.on_train_batch_end):
        weights[trainer.global_step] = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
        end(self, trainer, module, *rest)

    monkeypatch.setattr(training_module.TrainingModule, "training_step", training_step)
    monkeypatch.setattr(Telemetry, "on_train_batch_end", note)
    monkeypatch.setattr(spikes, "LEAST", 4)
    return weights


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_step_that_is_left_out_moves_nothing_and_its_number_is_in_the_row(make_run, data, spike_at_7, optimiser):
    row = execute(make_run("+trainer.skip_spikes=20", f"optim={optimiser}"), data)
    assert row["status"] == "done" and row["skipped_steps"] == [7]
    moved = {step: not torch.equal(spike_at_7[step], spike_at_7[step + 1]) for step in range(1, 12)}
    assert [step for step, own in moved.items() if not own] == [7]


def test_without_the_setting_every_step_is_taken(make_run, data, spike_at_7):
    row = execute(make_run(), data)
    assert row["skipped_steps"] is None and not torch.equal(spike_at_7[7], spike_at_7[8])


def test_a_run_that_goes_on_remembers_what_it_left_out(make_run, data, spike_at_7, killed_at, tmp_path):
    whole = execute(make_run("+trainer.skip_spikes=20"), data)
    run = make_run("+trainer.skip_spikes=20", f"session.root={tmp_path / 'again'}", "session.checkpoint_seconds=0")
    with killed_at(10):
        execute(run, data)
    row = execute(run, data)
    assert row["skipped_steps"] == [7] and row["bits_per_byte"] == whole["bits_per_byte"]


@pytest.mark.parametrize("factor", [1.0, 0.0, math.nan])
def test_a_factor_that_leaves_out_ordinary_steps_is_refused(make_run, data, factor):
    with pytest.raises(ValueError, match=r"trainer.skip_spikes=.* must be above 1, or null"):
        execute(make_run(f"+trainer.skip_spikes={factor}"), data)
