"""A sweep is priced on hardware that is not here: by its FLOPs, its operations, and how many devices share it."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.sweeps.hardware import Hardware, makespan, operations_per_block
from experiments.sweeps.plan import Arm
from tests.sweeps.untrained import Untrained

CARD = Hardware("a card", 1e12, 1e9, (0.2, 0.4), (1e-5, 2e-5), 2, None)
CONFIGS = Path(__file__).parents[2] / "configs/hardware"


def priced(cell):
    return CARD.seconds(cell.steps, cell.flops, 100)


def described(cells, card=CARD):
    return list(card.describe(cells, [*map(priced, cells)]))


@pytest.fixture
def cells():
    return Untrained(tuning=None).plan.cells


def test_a_step_takes_as_long_as_its_arithmetic_or_its_launches_whichever_is_longer():
    assert CARD.seconds(steps=10, flops=1e12, operations=1) == (2.5, 5.0), "a tenth of the FLOPs per step"
    assert CARD.seconds(steps=1000, flops=1e9, operations=1000) == (10.0, 20.0), "a million operations"
    assert CARD.seconds(steps=10, flops=4e12, operations=1)[0] == 10.0, "four times the FLOPs, four times as long"


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=50), st.integers(1, 20))
def test_runs_on_several_devices_end_no_sooner_than_they_can_and_within_twice_of_that(seconds, devices):
    least = max(max(seconds), sum(seconds) / devices)
    assert least * (1 - 1e-9) <= makespan(seconds, devices) <= 2 * least * (1 + 1e-9)
    assert makespan(seconds, 1) == pytest.approx(sum(seconds))
    assert makespan(seconds, len(seconds)) == max(seconds)


def test_a_stage_waits_for_the_one_before(cells):
    kinds = [replace(cell, kind=kind, steps=1, flops=1e12) for cell in cells[:2] for kind in ("tune", "fit", "holdout")]
    said = described(kinds)
    assert "15 s to 30 s of one a card; 2 of them would take 8 s to 15 s" in said[0]


def test_money_is_only_named_at_a_stated_rate(cells):
    hour = [replace(cells[0], steps=1, flops=0.2e12 * 3600)]
    assert any("hardware.dollars_per_hour=" in line for line in described(hour))
    said = described(hour, replace(CARD, dollars_per_hour=3.0))
    assert "Money: $1.50 to $3.00 at $3 per hour" in said[1]


def test_models_that_do_not_fit_a_device_are_named(cells):
    assert not any("do not fit" in line for line in described(cells))
    said = described([*cells, replace(cells[0], params=10**9)])
    assert said[-1].startswith("1 cells do not fit one of them: arm0 of 1,000,000,000 parameters has 16 GB")


def test_one_long_cell_is_said_to_hold_up_the_others(cells):
    said = described([*cells, replace(cells[0], flops=1e18)])
    assert any(line.startswith("The longest cell alone, arm0 at 3e+10") for line in said)


@pytest.mark.parametrize("arch", ["transformer", "gated_delta_hybrid"])
def test_the_operations_of_a_step_grow_with_the_depth_alone(make_config, data, arch):
    def counted(width, depth):
        spec = OmegaConf.create({"arch": arch, "objective": "next_token", "overrides": [f"arch.model.depth={depth}"]})
        return operations_per_block(Arm(spec, 20, lambda overrides: make_config(*overrides), data), width)

    assert counted(16, 4) == counted(32, 4) > 20
    assert counted(16, 8) * 8 == pytest.approx(counted(16, 4) * 8, rel=0.3), "embedding and head are shared out"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_named_hardware_says_where_its_figures_are_from(path):
    config = OmegaConf.load(path)
    for base in config.pop("defaults", []):
        config = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{base}.yaml"), config)
    assert instantiate(config).seconds(1, 1e15, 1)[0] > 0
    assert "utilisation" not in path.read_text() or path.read_text().count("#") >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "hardware.devices=0 must be above 0"),
        ({"utilisation": [0.5, 0.4]}, r"hardware.utilisation=\[0.5, 0.4\] must be the least and the greatest"),
        ({"utilisation": [0.5, 1.4]}, "hardware.utilisation"),
        ({"operation_seconds": [0.0, 1.0]}, "hardware.operation_seconds"),
        ({"dollars_per_hour": -1}, "hardware.dollars_per_hour=-1 must not be below 0"),
    ],
)
def test_hardware_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CARD, **changes)
