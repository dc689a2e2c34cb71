"""Reports by position and by distance: what they are by definition, and their sums those of the run."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from experiments import context
from experiments.data.associative_recall import associative_recall
from experiments.harness.parts import build_model, build_objective
from experiments.harness.run import execute
from experiments.harness.weights import FinishedRun, load_run
from experiments.studies.by_position import at_length, bits_by_position, distances, recall_by_distance
from experiments.studies.recall import accuracy
from objectives.contracts import Batch

RECALL = (
    "data=associative_recall", "data.sequence_length=48", "data.tokens.pairs=[4]", "data.tokens.power=1.0",
    "data.tokens.train_sequences=64", "data.tokens.heldout_sequences=30", "budget.flops=2e7",
)  # fmt: skip


@pytest.fixture
def untrained(make_run, data):
    """Returns overrides -> a model whose predictions all differ, with the data of the tests."""

    def make(*overrides):
        config = make_run(*overrides).config
        objective = build_objective(config, data)
        torch.manual_seed(0)
        model = build_model(config, objective).eval()
        torch.nn.init.normal_(model.head.weight)
        return FinishedRun(config, model, objective, data)

    return make


def mean_by(table: pd.DataFrame, column: str, weight: str) -> float:
    return (table[column] * table[weight]).sum() / table[weight].sum()


@pytest.mark.parametrize("override", ["data.packed=false", "data.packed=true", "data.sequence_length=48"])
def test_each_position_has_the_nats_that_one_more_token_adds_to_its_window(untrained, override):
    finished = untrained(override)
    finished = replace(finished, data=replace(finished.data, heldout=finished.data.heldout[:110], heldout_bytes=110))
    T, tokens = finished.config.data.sequence_length, torch.from_numpy(finished.data.heldout.astype(np.int64))
    sums, number = np.zeros(T), np.zeros(T)
    for window_T in tokens.split(T):
        starts = torch.zeros(1, T, dtype=torch.bool)
        starts[0, 0] = True  # the data has no eot
        prefixes = [Batch.of(window_T[None, : t + 1]) for t in range(len(window_T))]
        if finished.config.data.packed:
            prefixes = [replace(batch, starts_BT=starts[:, : t + 1]) for t, batch in enumerate(prefixes)]
        nats = [
            float(finished.objective.evaluate(finished.model, batch, torch.Generator()).nats_B) for batch in prefixes
        ]
        sums[: len(nats)] += np.diff(nats, prepend=0.0)
        number[: len(nats)] += 1
    table = bits_by_position(finished)
    assert table["first"].tolist() == [0, 1, 2, 4, 8, 16] + [32] * (T > 32)
    for row in table.itertuples():
        inside = slice(row.first, row.last + 1)
        assert row.tokens == number[inside].sum()
        per_byte = sums[inside].sum() / np.log(2) / row.tokens  # one byte per token
        assert row.bits_per_byte == pytest.approx(per_byte, rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["next_token", "multi_token"])
def test_the_mean_over_positions_is_the_bits_per_byte_of_the_run(make_run, data, objective):
    run = make_run(f"objective={objective}")
    row = execute(run, data)
    table = bits_by_position(load_run(run.folder, data))
    assert table.tokens.sum() == len(data.heldout)
    assert mean_by(table, "bits_per_byte", "tokens") == pytest.approx(row["bits_per_byte"], rel=1e-5)


def test_the_standard_error_is_that_of_a_mean_over_windows(untrained, data):
    short = untrained()
    long = replace(short, data=replace(data, heldout=np.tile(data.heldout[:960], 9), heldout_bytes=8640))
    once, often = (bits_by_position(replace(run, data=run.data)) for run in (short, long))
    assert (often.bits_per_byte_se * 3 / once.bits_per_byte_se).between(0.9, 1.1).all()


def test_an_objective_that_scores_whole_windows_has_no_bits_by_position(untrained):
    with pytest.raises(ValueError, match="MaskedDiffusion gives no bits by position"):
        bits_by_position(untrained("objective=masked_diffusion"))


@dataclass(frozen=True)
class Shortsighted:
    """An objective's stand-in that knows the answers whose keys are near."""

    reach: int

    def logits(self, model, batch):
        near_BT = distances(batch.tokens_BT, batch.counted_BT, "test") <= self.reach
        said_BT = torch.where(near_BT, batch.tokens_BT, batch.tokens_BT - 1)
        return F.one_hot(said_BT[batch.counted_BT], 64).float()


@pytest.fixture
def recall_data():
    return associative_recall(64, [4, 8], 64, train_sequences=1, heldout_sequences=200, power=1.0, seed=0)


@pytest.mark.parametrize("reach", [15, 31])
def test_recall_is_by_the_distance_between_a_key_and_where_it_was_shown(untrained, recall_data, reach):
    finished = replace(untrained("data.sequence_length=64"), data=recall_data, objective=Shortsighted(reach))
    table = recall_by_distance(finished)
    assert table.answers.sum() == recall_data.heldout_bytes
    assert table.accuracy.tolist() == [float(last <= reach) for last in table["last"]]
    assert {0.0, 1.0} == set(table.accuracy) and (table.accuracy_se == 0).all()


@pytest.mark.thorough
def test_the_mean_over_distances_is_the_recall_of_the_run(make_run):
    run = make_run(*RECALL)
    execute(run)
    finished = load_run(run.folder)
    whole = accuracy(finished.model, finished.objective, finished.data, 48)[4]
    assert mean_by(recall_by_distance(finished), "accuracy", "answers") == pytest.approx(whole)


def test_distances_are_counted_from_the_last_place_of_the_key():
    tokens_BT = torch.tensor([[5, 9, 6, 8, 5, 9, 3, 5, 9], [6, 8, 1, 1, 6, 8, 2, 2, 2]])
    answers_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    answers_BT[0, 5] = answers_BT[0, 8] = answers_BT[1, 5] = True
    found_BT = distances(tokens_BT, answers_BT, "test")
    assert found_BT[0, 5] == 4 and found_BT[0, 8] == 3 and found_BT[1, 5] == 4 and found_BT.sum() == 11
    for wrong in ((0, 3), (0, 0), (1, 1)):
        answers_BT = torch.zeros_like(answers_BT)
        answers_BT[wrong] = True
        with pytest.raises(ValueError, match=f"test has an answer at position {wrong[1]} whose key is not shown"):
            distances(tokens_BT, answers_BT, "test")


def test_data_without_answers_has_no_recall(untrained):
    with pytest.raises(ValueError, match="cycle marks no answers"):
        recall_by_distance(untrained())


def test_a_run_is_looked_at_in_windows_of_any_length(untrained, make_run):
    finished = replace(untrained(), config=make_run(*RECALL).config)
    longer = at_length(finished, 96)
    assert longer.config.data.sequence_length == longer.config.data.tokens.sequence_length == 96
    assert finished.config.data.sequence_length == 48 and len(longer.data.heldout) == 96 * 30
    with pytest.raises(ValueError, match="lengths=0 must be at least 1"):
        at_length(finished, 0)


@pytest.mark.thorough
def test_the_command_prints_a_table_for_each_length(make_run, monkeypatch, capsys):
    run = make_run(*RECALL)
    execute(run)
    for by, words in (("distance", "accuracy"), ("position", "bits_per_byte")):
        monkeypatch.setattr("sys.argv", ["context", f"run={run.folder}", "lengths=[48,96]", f"by={by}"])
        context.main()
        shown = capsys.readouterr().out
        assert words in shown and re.findall(r"windows of (\d+) tokens, trained with 48", shown) == ["48", "96"]
