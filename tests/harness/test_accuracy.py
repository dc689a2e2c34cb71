"""Accuracy: which answers count as right, of which windows, and how it comes into a run's row."""

import pytest
import torch

from experiments.data.modular_addition import modular_addition
from experiments.harness.accuracy import accuracy
from experiments.harness.run import execute
from objectives.next_token import NextToken

DATA = modular_addition(modulus=7, train_fraction=0.5, sequence_length=3, seed=0)


class Knows(torch.nn.Module):
    """In place of a model: adds numbers whose first is below a limit, and takes all other sums for 0."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.embedding = limit, torch.nn.Embedding(1, 1)

    def hidden(self, inputs_BT, visibility):
        first_B, second_B = inputs_BT[:, 1], inputs_BT[:, 2]
        sum_B = torch.where(first_B < self.limit, (first_B + second_B) % 7, 0)
        return torch.nn.functional.one_hot(sum_B, 8).float()[:, None].expand(-1, 3, -1)

    def logits(self, hidden):
        return hidden


def expected(tokens, limit):
    rows = tokens.reshape(-1, 3).astype(int)
    return ((rows[:, 2] == 0) | (rows[:, 0] < limit)).mean()


@pytest.mark.parametrize("limit", [0, 3, 7])
@pytest.mark.parametrize("windows", [5, 1000])
def test_it_is_the_fraction_of_answers_whose_likeliest_token_is_right_in_the_first_windows_of_each_part(limit, windows):
    found = accuracy(Knows(limit), NextToken(8, 7), DATA, sequence_length=3, packed=False, windows=windows)
    for part, tokens in (("train", DATA.train), ("heldout", DATA.heldout)):
        value, low, high = found[part]["accuracy"]
        assert value == pytest.approx(expected(tokens[: 3 * windows], limit)) and low <= value <= high


@pytest.mark.thorough
def test_a_run_is_scored_by_its_accuracy_where_the_data_says_on_how_many_windows(make_run):
    small = "data=modular_addition", "data.tokens.modulus=7", "data.sequence_length=3"
    small += "data.allow_repeats=true", "budget.batch_tokens=60"
    asked, silent = (execute(make_run(*small, "budget.flops=2e8", f"data.accuracy={n}")) for n in (9, "null"))
    assert asked["status"] == "done", asked["error"]
    assert set(asked["tasks"]) == {"train", "heldout"} and silent["tasks"] is None
    assert asked["bits_per_byte"] == silent["bits_per_byte"] and asked["id"] != silent["id"]
    with pytest.raises(ValueError, match="data.accuracy=0 must be at least 1"):
        make_run(*small, "data.accuracy=0")
