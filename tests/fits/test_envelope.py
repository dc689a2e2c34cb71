"""The envelope of learning curves: the law of the surface under them, from the sizes that are best at some compute."""

import numpy as np
import pandas as pd
import pytest

from experiments.findings import Refused
from experiments.fits.envelope import fit_envelope, trace_envelope
from experiments.fits.forms import Surface

TRUE = Surface(1.69, 406.4, 410.7, 0.34, 0.28)


def curves(sizes, noise=0.0):
    """Each size trained to 400 tokens per parameter, every point as a run of that length would have ended."""
    rng, out = np.random.default_rng(0), []
    for i, n in enumerate(np.geomspace(1e7, 1e10, sizes)):
        d = n * np.geomspace(1, 400, 40)
        loss = TRUE.loss(n, d) * np.exp(rng.normal(0, noise))
        out.append(pd.DataFrame({"run": f"r{i}", "flops": 6 * n * d, "params": n, "tokens": d, "loss": loss}))
    return pd.concat(out, ignore_index=True)


@pytest.mark.parametrize(("sizes", "noise", "tolerance"), [(16, 0.0, 0.01), (16, 0.002, 0.02), (24, 0.0, 0.005)])
def test_the_exponents_of_the_surface_are_found(sizes, noise, tolerance):
    size, tokens, used = fit_envelope(curves(sizes, noise))
    assert size.slope == pytest.approx(TRUE.a, abs=tolerance) and TRUE.a in size.estimate_slope()
    assert tokens.slope == pytest.approx(1 - TRUE.a, abs=tolerance) and used <= sizes - 2


def test_the_smallest_and_the_largest_size_are_never_taken_for_the_best():
    table = curves(8)
    best = trace_envelope(table).params
    assert best.min() > 1.1 * table.params.min() and best.max() < table.params.max() / 1.1


def test_points_lie_on_the_curves():
    points = trace_envelope(curves(8))
    assert (points.flops / (6 * points.params * points.tokens)).to_numpy() == pytest.approx(1)


def test_too_few_sizes_are_refused_with_what_to_do():
    refused = fit_envelope(curves(4))
    assert isinstance(refused, Refused) and "name more learning curves" in refused.refused


def test_runs_that_are_no_curves_are_refused():
    assert isinstance(fit_envelope(curves(8).groupby("run").tail(1)), Refused)
