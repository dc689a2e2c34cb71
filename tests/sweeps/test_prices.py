"""The price of a cell is what such cells have cost, or what a few steps say before there are any."""

import numpy as np
import pandas as pd
import pytest

from experiments.sweeps.prices import Price, fitted, prices
from tests.sweeps.untrained import Untrained


def runs(price, cells, noise=0.0):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame([vars(cell) for cell in cells])
    return rows.assign(wall_seconds=[price.of(cell) * np.exp(noise * rng.standard_normal()) for cell in cells])


def steps_of(cells):
    """Returns the cells with steps of 512 tokens each, which Untrained leaves with one step."""
    return [type(cell)(**vars(cell) | {"steps": cell.tokens // 512}) for cell in cells]


def test_runs_that_are_finished_tell_the_price_of_larger_ones():
    truth = Price(2.0, 0.008, 2e-11, 1e-6)
    cells = steps_of(Untrained(tuning=None, recentre=False, widen=0).plan.cells)
    known = [cell for cell in cells if cell.budget < 2e11]
    found = fitted(runs(truth, known, noise=0.05))
    for cell in cells:
        assert found.of(cell) == pytest.approx(truth.of(cell), rel=0.15)
    assert min(vars(found).values()) >= 0


def test_every_arm_is_priced_by_its_own_runs():
    sweep = Untrained(tuning=None, recentre=False, widen=0)
    sweep.run(sweep.plan.cells)
    slow = sweep.rows.arm == "arm1"
    sweep.rows.loc[slow, "wall_seconds"] *= 3
    price = prices(sweep.arms, [], sweep.rows)
    for cell in sweep.plan.cells:
        assert price(cell) == pytest.approx((3e-10 if cell.arm == "arm1" else 1e-10) * cell.flops, rel=1e-6)
