"""Budgets become whole sequences, steps and batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness.budget import allocate


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.floats(1.01, 1e6),
    flops_per_token=st.floats(1e3, 1e12),
    T=st.integers(1, 4096),
    batch=st.none() | st.integers(1, 10**7),
)
def test_a_budget_is_met_from_below_to_within_one_sequence(sequences, flops_per_token, T, batch):
    budget = sequences * flops_per_token * T
    got = allocate(budget, flops_per_token, T, batch)
    assert got.flops == flops_per_token * got.tokens
    assert got.flops <= budget * (1 + 1e-9) and got.flops > budget - 1.0001 * flops_per_token * T
    assert got.tokens == got.sequences * T


@settings(max_examples=100, deadline=None)
@given(sequences=st.integers(1, 5000), T=st.integers(1, 64), batch=st.integers(1, 5000))
def test_steps_cover_every_sequence_once_in_batches_that_differ_by_one_at_most(sequences, T, batch):
    got = allocate(sequences * T * 10.0, 10.0, T, batch)
    edges = [got.first_sequence(step) for step in range(got.steps + 1)]
    sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[0] == 0 and edges[-1] == sequences
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@settings(max_examples=200, deadline=None)
@given(
    budget=st.floats(1.0, 1e5),
    T=st.integers(1, 64),
    batch=st.none() | st.integers(1, 10**4),
    per_step=st.floats(0.0, 1e3),
)
def test_steps_that_cost_something_themselves_are_paid_from_the_same_budget(budget, T, batch, per_step):
    budget *= T + per_step
    got = allocate(budget, 1.0, T, batch, per_step)
    assert got.flops == got.tokens + per_step * got.steps <= budget * (1 + 1e-9)
    more = got.sequences + 1  # a batch that grows may save a step now and then
    assert batch is None or T * more + per_step * -(-more // max(1, min(more, round(batch / T)))) > budget * (1 - 1e-9)


def test_the_batch_grows_more_slowly_than_the_run():
    short, long = (allocate(1e6 * tokens, 1e6, 128) for tokens in (1_000_000, 100_000_000))
    assert 1 < long.tokens / long.steps / (short.tokens / short.steps) < 100
    assert long.steps > short.steps


def test_a_budget_below_one_sequence_names_the_least():
    with pytest.raises(ValueError, match=r"does not pay for one step.*1.28e\+08 FLOPs"):
        allocate(1e8, 1e6, 128)
