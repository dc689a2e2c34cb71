"""Knowledge: who remembers more facts and who follows more chains, at equal FLOPs."""

import pandas as pd
import pytest

from experiments.studies.knowledge import Knowledge

NAMES = ["facts_experts", "facts_dense", "chains_dense", "chains_experts"]
STUDY = Knowledge(
    "c", "s", "r", dict.fromkeys(NAMES, []), better=[NAMES[0], NAMES[3]], than=[NAMES[1], NAMES[2]], margin=0.05,
    shares={}, begins={}, learning_rates=[0.01], widen=0, tuning_seed=1000, seeds=[0, 1, 2],
)  # fmt: skip


def table(facts, chains, scatter=0.01, seeds=3):
    """Runs of which the dense get half of all answers right, and the experts so much more; 100 facts of 3 letters of 4
    bits, of which half are known, in 600 parameters."""
    rows = []
    for name in NAMES:
        task, kind = name.split("_")
        ahead = {"facts": facts, "chains": chains}[task] if kind == "experts" else 0.0
        known = {"facts": 100, "letters": 3, "bits_per_letter": 4.0} if task == "facts" else {}
        rows += [
            {"variant": name, "stage": "compare", "status": "done", "seed": seed, "learning_rate": 0.01,
             "bits_per_byte": 2.0, "params_total": 600, "accuracy": 0.5 + ahead * (1 + scatter * (seed - 1)), **known}
            for seed in range(seeds)
        ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("facts", "chains", "outcome", "read"),
    [
        (0.4, 0.0, "holds", "chains"),
        (0.4, 0.3, "does not hold", "chains"),
        (0.0, 0.0, "does not hold", "facts"),
        (0.4, 0.05, "cannot tell", "chains"),
    ],
)
def test_experts_must_know_more_and_follow_chains_no_better(facts, chains, outcome, read):
    verdict = STUDY.verdict(table(facts, chains))
    assert verdict.outcome == outcome
    assert verdict.effect.value == pytest.approx({"facts": facts, "chains": chains}[read])
    assert f"Read from {read}_experts less {read}_dense." in verdict.sentence


def test_bits_per_parameter_are_those_that_an_answer_no_longer_costs():
    assert (
        "a parameter holds 1.00 bits in facts_experts and 1.00 in facts_dense" in STUDY.verdict(table(0.4, 0)).sentence
    )


def test_one_seed_is_too_few():
    assert STUDY.verdict(table(0.4, 0.0, seeds=1)).outcome == "cannot tell"
