"""Forgetting: what is measured between a model and its base, and the verdict that follows from pairs of methods."""

import copy
import math
from functools import partial

import pandas as pd
import pytest
import torch

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from experiments.data.environment_data import environment_data
from experiments.data.environments.countdown import Countdown
from experiments.harness.tasks import heldout_problems
from experiments.studies.forgetting import (
    Forgetting,
    against_base,
    concordance,
    divergence,
    forgotten_at_equal_gain,
)
from objectives.contracts import Batch, Request
from objectives.next_token import NextToken
from objectives.post_training.tuning import prompts_of

METHODS = ("full", "lora", "rl")
STUDY = Forgetting(
    "c", "s", "r", old={}, correct=0.3, base=[], teacher=[], methods=dict.fromkeys(METHODS, {}), seeds=[], prompts=1,
    samples=1,
)  # fmt: skip


def table(forgetting, gains=(0.1, 0.2, 0.3)):
    """Three models of each method, at divergences of about 1, 2 and 3, beside a base with 0.5 and 0.1."""
    rows = [{"method": "base", "pass@1": 0.1, "old_bits_per_byte": 0.5, "kl": 0.0}]
    for method, further, values in zip(METHODS, (0.0, 0.1, -0.1), forgetting, strict=True):
        for i, (lost, gain) in enumerate(zip(values, gains, strict=True)):
            rows.append(
                {"method": method, "learning_rate": 0.1 * (i + 1), "pass@1": 0.1 + gain}
                | {"old_bits_per_byte": 0.5 + lost, "kl": 1.0 + i + further}
            )
    return pd.DataFrame(rows).assign(status="done")


def test_gain_and_forgetting_are_counted_from_the_base():
    models = against_base(table([(0.0, 0.2, 0.3)] * 3))
    assert len(models) == 9
    assert models.forgetting.tolist() == pytest.approx([0.0, 0.2, 0.3] * 3)
    assert models.gain.tolist() == pytest.approx([0.1, 0.2, 0.3] * 3)


@pytest.mark.parametrize(
    ("forgetting", "outcome"),
    [
        ([(1.0, 2.0, 3.0), (1.1, 2.1, 3.1), (0.9, 1.9, 2.9)], "holds"),
        ([(1.1, 2.1, 3.1), (0.10, 0.11, 0.12), (4.0, 5.0, 6.0)], "does not hold"),  # each a law of its own
        ([(3.0, 2.0, 1.0), (3.1, 2.1, 1.1), (2.9, 1.9, 0.9)], "does not hold"),
        ([(1.0, 2.0, 3.0), (1.1, 2.1, 3.1), (0.2, 0.3, 2.9)], "cannot tell"),
    ],
)
def test_the_verdict_is_whether_one_law_serves_all_methods(forgetting, outcome):
    verdict = STUDY.verdict(table(forgetting))
    assert verdict.outcome == outcome and verdict.rule == "r"


def test_pairs_of_one_method_tell_nothing():
    rows = table([(3.0, 2.0, 1.0), (6.0, 5.0, 4.0), (9.0, 8.0, 7.0)])
    rows["kl"] = [0.0] + [i + j / 10 for i in (1, 2, 3) for j in range(3)]  # the wrong way round within each method
    assert concordance(against_base(rows), "kl").value == 1


@pytest.mark.parametrize("missing", ["base", "rl"])
def test_without_a_base_or_with_one_method_nothing_can_be_told(missing):
    rows = table([(1.0, 2.0, 3.0)] * 3)
    rows = rows[rows.method != "base"] if missing == "base" else rows[rows.method.isin(["base", "full"])]
    assert STUDY.verdict(rows).outcome == "cannot tell"


def test_methods_are_compared_at_a_gain_that_all_of_them_reach():
    rows = table([(0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0.7, 0.8, 0.9)])
    rows.loc[rows.method == "rl", "pass@1"] = [0.11, 0.2, 0.12]
    level, least = forgotten_at_equal_gain(against_base(rows))
    assert level == pytest.approx(0.09)
    assert least.to_dict() == pytest.approx({"full": 0.1, "lora": 0.4, "rl": 0.8})


@pytest.fixture(scope="module")
def policies():
    """A model and one that has moved from it, their objective, and the problems that they are asked."""
    data = environment_data(Countdown(3), 16, train_problems=8, heldout_problems=64)
    attention = partial(Attention, head_dim=8, queries_per_kv=1, position=None)
    model = LanguageModel(data.vocab_size, 8, pattern=["attention"], mixers={"attention": attention}, depth=1)
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, moved, NextToken(data.vocab_size, data.eot), data


def test_the_divergence_of_a_model_from_itself_is_nothing(policies):
    _, moved, objective, data = policies
    assert divergence(moved, copy.deepcopy(moved), objective, data, 16) == (0.0, 0.0)


def test_the_divergence_is_the_mean_log_ratio_of_what_is_written(policies):
    model, moved, objective, data = policies
    value, error = divergence(moved, model, objective, data, 16)
    prompts = prompts_of(heldout_problems(data, 16))
    request = Request(prompts, 16, torch.Generator().manual_seed(1), copies=50, stop=(data.eot,))
    written = objective.sample(moved, request)
    batch = Batch(written.tokens_BT, (written.order_BT >= 0).float())
    ratio_B = written.log_probs_BT.sum(1) + objective.evaluate(model, batch, torch.Generator()).nats_B
    spread = math.hypot(error, ratio_B.std().item() / len(ratio_B) ** 0.5)
    assert value > 5 * error
    assert abs(value - ratio_B.mean().item()) < 4 * spread
