"""Over-optimisation: gold rewards and distances of policies, and the verdict that follows from planted curves."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.data.hidden_markov import FLOOR, HiddenMarkovLanguage
from experiments.enumeration import END, SEQUENCES, START, L, Table, V
from experiments.findings import Estimate
from experiments.fits.over_optimisation import reward_at
from experiments.studies.over_optimisation import OverOptimisation, gold_reward, points_of, share, trend
from objectives.contracts import Batch
from objectives.next_token import NextToken
from objectives.post_training.divergences import written_kl

LANGUAGE = HiddenMarkovLanguage(4, 6, concentration=0.2, seed=0)
STUDY = OverOptimisation(
    "c", "s", "r", widths=[16, 32], comparisons=[250, 4000], seeds=[0, 1], read=1, pool=8, candidates=[1, 4], legs=[1],
    answers=1, policy=[], proxy=[], tuning=[],
)  # fmt: skip


def test_the_gold_reward_of_a_whole_answer_is_its_likelihood_per_symbol():
    tokens_BT = LANGUAGE.sample(5, 8, torch.Generator().manual_seed(0))
    assert torch.allclose(gold_reward(LANGUAGE, Batch.of(tokens_BT)), LANGUAGE.log_likelihood(tokens_BT) / 8)


def test_symbols_that_an_answer_lacks_count_as_the_least_likely():
    tokens_BT = LANGUAGE.sample(5, 8, torch.Generator().manual_seed(0))
    begun_B = LANGUAGE.log_likelihood(tokens_BT[:, :5])
    tokens_BT[:, 5] = LANGUAGE.symbols  # an end; what stands behind it has no meaning
    ended = Batch(tokens_BT, (torch.arange(8) < 6).float().expand(5, -1))
    expected = (begun_B + 3 * math.log(FLOOR)) / 8
    assert torch.allclose(gold_reward(LANGUAGE, ended), expected)
    other = replace(ended, tokens_BT=tokens_BT.clone().index_fill_(1, torch.tensor([6, 7]), 0))
    assert torch.equal(gold_reward(LANGUAGE, other), gold_reward(LANGUAGE, ended))


def test_the_distance_is_the_divergence_in_expectation_over_what_the_policy_writes():
    objective, models = NextToken(V, START), [Table(True, seed=seed) for seed in (0, 1)]
    whole = Batch.of(SEQUENCES)
    log_p, log_base = (-objective.nats(model, whole, torch.Generator()).sum(1) for model in models)
    exact = (log_p.exp() * (log_p - log_base)).sum().item()
    each = [written_kl(*models, objective, Batch.of(SEQUENCES[i : i + 1])).item() for i in range(len(SEQUENCES))]
    assert float(log_p.exp().detach() @ torch.tensor(each, dtype=torch.float64)) == pytest.approx(exact, rel=1e-10)
    assert (written_kl(models[0], models[0], objective, whole) == 0).all()
    ended = Batch(SEQUENCES, (SEQUENCES[:, :1] != END).float() * torch.ones(L))  # nothing counts behind an early end
    assert 0 < written_kl(*models, objective, ended).mean() < written_kl(*models, objective, whole).mean()


def table(peaks, d=(0.5, 1.0, 2.0, 3.0, 4.0), jitter=0.02, widths=(16, 32), seeds=(0, 1, 2), n=(1, 4, 16)):
    """Curves whose RL peaks at the given distance by the number of comparisons, for each width and seed."""
    random, rows = np.random.default_rng(0), []
    for comparisons, at in peaks.items():
        for width in widths:
            for seed in seeds:
                found = {"width": width, "comparisons": comparisons, "seed": seed, "status": "done"}
                beta = 0.2 * random.normal(1, jitter)
                for leg, distance in enumerate(d, 1):
                    gold = float(reward_at("rl", np.array(distance), beta * (1 + math.log(at)), beta))
                    rows.append(found | {"stage": "rl", "leg": leg, "kl": distance**2, "gold": gold, "proxy": 0.1})
                for number in n:
                    moved = math.log(number) - (number - 1) / number
                    gold = float(reward_at("best_of_n", np.array(moved**0.5), 0.2 + width / 1000, 0.05))
                    rows.append(found | {"stage": "proxy", "n": number, "kl": moved, "gold": gold, "proxy": 0.1})
    return pd.DataFrame(rows)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("peaks", "outcome"),
    [
        ({250: 1.0, 1000: 1.4, 4000: 2.0}, "holds"),
        ({250: 2.0, 1000: 1.4, 4000: 1.0}, "does not hold"),
        ({250: 1.4, 1000: 1.4, 4000: 1.4}, "cannot tell"),
        ({250: 9.0, 1000: 10.0, 4000: 12.0}, "does not hold"),  # nothing falls as far as it was pushed
        ({250: 0.01, 1000: 0.02, 4000: 0.03}, "does not hold"),  # nothing rises
    ],
)
def test_the_verdict_is_the_rule_applied_to_the_curves(peaks, outcome):
    verdict = STUDY.verdict(table(peaks))
    assert verdict.outcome == outcome and verdict.rule == "r"


@pytest.mark.thorough
def test_a_proxy_with_a_failed_leg_takes_no_part_in_rise_and_fall():
    rows = table({250: 1.0, 1000: 1.4, 4000: 2.0})
    rows.loc[(rows.stage == "rl") & (rows.leg == 5) & (rows.seed == 0), "status"] = "failed"
    assert STUDY.verdict(rows).sentence.startswith("Over 12 proxies")


def test_three_proxies_are_too_few():
    few = STUDY.verdict(table({250: 1.0, 1000: 1.4, 4000: 2.0}, widths=[16], seeds=[0]))
    assert few.outcome == "cannot tell" and few.effect is None and few.sentence.startswith("3 proxies are too few")


def test_trends_are_over_proxies_and_of_one_value_there_is_none():
    points = points_of(table({250: 1.0, 4000: 2.0}, jitter=0), "rl")
    assert trend(points, "rl", "comparisons").value == pytest.approx(1) and share("rl", points) == pytest.approx(1)
    assert trend(points[points.width == 16], "rl", "width") == Estimate(0.0, -1.0, 1.0)


def test_a_pool_too_small_for_n_is_refused():
    with pytest.raises(ValueError, match="study.candidates=.* must be from 1 to study.pool=3"):
        next(replace(STUDY, pool=3).stages(None))
