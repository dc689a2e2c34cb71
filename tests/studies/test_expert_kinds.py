"""Experts by kind of text: planted choices are told apart, and the verdict follows from what they go by."""

import numpy as np
import pandas as pd
import pytest

from experiments.studies.expert_kinds import ExpertKinds, entropy, information, told

STUDY = ExpertKinds("c", "s", "r", seeds=[0, 1, 2], margin=0.1, skip=0)
RNG = np.random.default_rng(0)
N = 20_000


def test_information_is_that_of_the_frequencies():
    x, y, g = RNG.integers(0, 3, (3, 500))
    z = (x + y + g) % 3
    joint = np.histogram2d(x, y, bins=3)[0] / 500
    expected = joint * np.log2(joint / joint.sum(1, keepdims=True) / joint.sum(0, keepdims=True))
    assert information(x, y) == pytest.approx(expected.sum())
    assert entropy(x, y) == pytest.approx(-(joint * np.log2(joint)).sum())
    assert information(x, z, y * 3 + g) == pytest.approx(entropy(x, y * 3 + g) - entropy(y, g))


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        (lambda byte, kind: byte % 4, {"byte": 2.0, "kind_beyond": 0.0}),
        (lambda byte, kind: kind, {"byte": 0.0, "kind": 1.0, "kind_beyond": 1.0}),
        (lambda byte, kind: (byte + kind) % 2, {"byte": 0.0, "kind": 0.0, "kind_beyond": 1.0}),
        (lambda byte, kind: RNG.integers(0, 8, N), {"byte": 0.0, "kind": 0.0, "kind_beyond": 0.0}),
    ],
)
def test_it_is_told_what_experts_go_by(planted, expected):
    byte, kind = RNG.integers(0, 200, N), RNG.integers(0, 2, N)
    expert = planted(byte, kind)
    found = told(np.stack([expert, expert], axis=1), byte, kind)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.03)
    assert found["kinds"] == pytest.approx(1.0, abs=0.01) and found["choice"] == pytest.approx(entropy(expert))


def test_the_kind_that_the_byte_gives_away_is_not_counted_beyond_it():
    byte = RNG.integers(0, 10, N)
    found = told((byte // 5)[:, None], byte, (byte >= 5).astype(int))
    assert found["kind"] == pytest.approx(1.0, abs=0.01) and found["kind_beyond"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("beyond", "outcome"),
    [
        ([0.02, 0.03, 0.02], "holds"),
        ([0.5, 0.6, 0.55], "does not hold"),
        ([0.02, 0.2, 0.1], "cannot tell"),
        ([0.02], "cannot tell"),
    ],
)
def test_the_verdict_is_the_rule_applied_to_the_mean_over_blocks(beyond, outcome):
    rows = [
        {"seed": seed, "status": "done", "model": model, "block": block, "byte": 1.0, "kind": 0.1, "choice": 3.0,
         "kinds": 1.2, "kind_beyond": (value if model == "trained" else 0.3) + (0.01 if block else -0.01)}
        for seed, value in enumerate(beyond) for model in ("trained", "untrained") for block in (0, 1)
    ]  # fmt: skip
    verdict = STUDY.verdict(pd.DataFrame(rows))
    assert verdict.outcome == outcome and verdict.rule == "r"
    if len(beyond) > 1:
        assert verdict.effect.value == pytest.approx(np.mean([value / (1 + value) for value in beyond]))
