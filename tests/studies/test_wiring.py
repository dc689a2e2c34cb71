"""Wiring: the measures of modules on made networks, and the verdict from made runs."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.harness.parts import build_model, build_objective, open_data
from experiments.harness.weights import FinishedRun
from experiments.studies.modules import (
    adjacency,
    contributions,
    effective,
    greedy_accuracy,
    importances,
    mean_length,
    modularity,
    negligible,
    problems_by_task,
    specialisation,
    wired,
)
from experiments.studies.wiring import L1, LENGTH, NONE, Wiring
from objectives.post_training.wiring import GAP, lengths, wires

STUDY = Wiring("c", "s", "r", strengths=[0.1, 0.2], margin=0.01, tuning_seed=9, seeds=[0, 1, 2, 3])
HIGH, LOW, MIXED, RIGHT = [0.8, 0.82, 0.79, 0.81], [0.5, 0.49, 0.52, 0.5], [0.2, 0.9, 0.4, 0.8], [1.0, 1.0, 0.999, 1.0]


def table(by_length, none, l1, accuracy):
    """Runs of so much specialisation, and of such an accuracy by length, one per seed."""
    rows = []
    for variant, values, right in ((NONE, none, RIGHT), (L1, l1, RIGHT), (LENGTH, by_length, accuracy)):
        for seed, value in enumerate(values):
            labels = {"variant": variant, "seed": seed, "stage": "compare", "status": "done", "strength": 0.1}
            found = {"specialisation": value, "specialisation_lost": value, "accuracy": right[seed], "units": 9.0}
            rows.append(labels | found | {"negligible": 0.5, "mean_length": 0.2, "modularity": 0.3})
    return pd.DataFrame([*rows, rows[0] | {"seed": 9, "stage": "tune", "specialisation": math.nan}])


@pytest.mark.parametrize(
    ("runs", "accuracy", "outcome"),
    [
        ((HIGH, LOW, LOW), RIGHT, "holds"),
        ((HIGH, LOW, HIGH), RIGHT, "cannot tell"),  # plain L1 does it as well
        ((LOW, LOW, HIGH), RIGHT, "does not hold"),
        ((LOW, HIGH, LOW), RIGHT, "does not hold"),
        ((HIGH, MIXED, LOW), RIGHT, "cannot tell"),
        ((HIGH, LOW, LOW), [0.9, 0.91, 0.9, 0.9], "does not hold"),
        ((HIGH, LOW, LOW), [0.97, 1.0, 1.0, 0.99], "cannot tell"),
        ((HIGH[:1], LOW, LOW), RIGHT, "cannot tell"),
        (([], LOW, LOW), RIGHT, "cannot tell"),
    ],
)
def test_it_holds_if_units_are_more_special_than_with_either_and_accuracy_is_kept(runs, accuracy, outcome):
    made = table(*runs, accuracy)
    verdict = STUDY.verdict(made)
    assert verdict.outcome == outcome and verdict.rule == "r"
    assert STUDY.figure(made).axes[0].get_title() == "specialisation of units"


@pytest.fixture
def finished(make_config):
    """A network of two tasks that has learnt nothing yet."""
    kinds = "sorting.Sorting,length:3", "modular_arithmetic.ModularArithmetic,modulus:2,operations:4"
    environments = ",".join("{_target_:experiments.data.environments." + kind + "}" for kind in kinds)
    config = make_config(
        "data=tasks", f"data.tokens.environment.environments=[{environments}]", "data.sequence_length=17",
        "data.tokens.train_problems=64", "data.tokens.heldout_problems=12", "data.scoring=null", "arch.width=16",
        "arch.model.depth=1",
    )  # fmt: skip
    data = open_data(config)
    objective = build_objective(config, data)
    torch.manual_seed(0)
    model = build_model(config, objective).eval()
    torch.nn.init.normal_(model.head.weight)
    return FinishedRun(config, model, objective, data)


def test_a_unit_that_writes_nothing_is_nothing_to_a_task_and_losing_another_costs(finished):
    model, batches = finished.model, problems_by_task(finished)
    assert sorted(batches) == ["modular-2x4", "sorting-3x1"] and sum(len(b.tokens_BT) for b in batches.values()) == 12
    (out,) = model.blocks[0].channel.residual_projections()
    with torch.no_grad():
        out.weight[:, 3] = 0.0
    batch = batches["sorting-3x1"]
    silent = sum(layer.in_features for layer, writes in wired(model) if writes) - out.in_features + 3
    wrote, lost = contributions(finished, batch), importances(model, finished.objective, batch)
    assert wrote.shape == lost.shape and wrote.argmin() == silent and wrote[silent] == lost[silent] == 0
    assert (wrote.sort().values[1:] > 0).all() and 0 < lost.max() <= 1 and lost.min() == 0


def test_answers_count_as_a_whole_by_their_likeliest_tokens(finished):
    batch = problems_by_task(finished)["modular-2x4"]
    right = torch.nn.functional.one_hot(batch.tokens_BT[batch.counted_BT], finished.data.vocab_size).double()

    class Knows:
        def logits(self, model, batch):
            return right

    assert greedy_accuracy(finished.model, Knows(), batch) == 1
    right[0] = 1 - right[0]  # one token of one answer
    assert greedy_accuracy(finished.model, Knows(), batch) == pytest.approx(1 - 1 / len(batch.tokens_BT))


def test_tasks_with_units_of_their_own_are_wholly_specialised():
    first, second = torch.tensor([2.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 3.0])
    assert specialisation(first, second) == 1 and specialisation(first, 3 * first) == 0
    assert specialisation(first, torch.tensor([1.0, 1.0, 1.0, 1.0])) == 0.5
    assert effective(first) == 2 and effective(torch.tensor([1.0, 0.0])) == 1


def test_lengths_and_weights_are_those_of_the_wires(finished):
    model = finished.model
    with torch.no_grad():
        for layer, copies in wires(model):
            length = lengths(layer, copies)
            layer.weight.copy_(torch.where(length == length.min(), 1.0, 1e-3))
    shortest = [lengths(layer, copies).min() - GAP for layer, copies in wires(model)]
    assert mean_length(model) < 0.1 and max(shortest) < 0.1 and negligible(model) > 0.8


def test_newmans_q_finds_two_groups_that_hardly_meet_and_none_in_a_full_graph(finished):
    group = np.ones((4, 4)) - np.eye(4)
    apart = np.block([[group, np.zeros((4, 4))], [np.zeros((4, 4)), group]])
    assert modularity(apart) == pytest.approx(0.5)
    assert modularity(np.ones((8, 8))) == pytest.approx(0, abs=1e-9)
    found = adjacency(finished.model)
    total = sum(layer.weight.abs().sum().item() for layer, _ in wires(finished.model))
    assert (found == found.T).all() and found.sum() / 2 == pytest.approx(total, rel=1e-5)
    assert not found[:16, :16].any() and not found[16:, 16:].any()
