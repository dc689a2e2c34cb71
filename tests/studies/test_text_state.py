"""Text state: what is asked of each byte, and the verdict that follows from units, probes and what they are to beat."""

import numpy as np
import pandas as pd
import pytest

from experiments.studies.text_state import STATES, TextState, best, labels

STUDY = TextState(
    "c", "s", "r", architectures={"a": [], "b": []}, seeds=[], state="string", margin=0.9, skip=16, every=1, last=16
)  # fmt: skip


def table(units, probes=(0.95, 0.95, 0.95), untrained=0.6, text=0.7):
    """Per seed the areas of the best unit and the best probe; a place that fits worse has better areas elsewhere."""
    rows = []
    for seed, (unit, probe) in enumerate(zip(units, probes, strict=True)):
        for arch, off in (("a", 0.01), ("b", -0.01)):
            run = {"architecture": arch, "seed": seed, "status": "done"}
            for state in STATES:
                for model, layer, u, p, fitted in (
                    ("trained", 1, 0.99, 0.5, 0.7), ("trained", 2, unit + off, probe, 0.9),
                    ("untrained", 1, untrained, 0.7, 0.9), ("text", 0, np.nan, text, 0.9),
                ):  # fmt: skip
                    areas = {"unit": u, "unit_fitted": fitted, "probe": p, "probe_fitted": fitted}
                    rows.append(run | {"state": state, "model": model, "place": "stream", "layer": layer} | areas)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("units", "settings", "outcome"),
    [
        ([0.94, 0.93, 0.94], {}, "holds"),
        ([0.80, 0.81, 0.82], {}, "does not hold"),  # far from the probe
        ([0.94, 0.93, 0.94], {"text": 0.97}, "does not hold"),  # the text itself tells more
        ([0.94, 0.93, 0.94], {"untrained": 0.96}, "does not hold"),  # nothing was grown
        ([0.94, 0.80, 0.97], {}, "cannot tell"),
        ([0.94], {"probes": (0.95,)}, "cannot tell"),
    ],
)
def test_the_unit_is_held_against_the_probe_and_against_what_needs_no_training(units, settings, outcome):
    verdict = STUDY.verdict(table(units, **settings))
    assert verdict.outcome == outcome and verdict.rule == "r"
    if len(units) > 1:
        assert verdict.effect.value == pytest.approx(np.mean([(2 * unit - 1) / 0.9 for unit in units]))


def test_a_place_is_chosen_by_the_documents_fitted_on():
    rows = table([0.8, 0.8, 0.8])
    chosen = best(rows[rows.model == "trained"], ["architecture", "seed", "state"], "unit")
    assert chosen.round(2).isin([0.79, 0.81]).all()


def test_states_are_those_of_whole_documents_and_every_second_is_kept_apart():
    tokens = np.array([*b"f('a',\n        1) #b", 256, *b"'("])
    states, scored, other = labels(tokens, 256)
    said = {name: "".join("x" if state else "." for state in states[:, i]) for i, name in enumerate(STATES)}
    assert said == {
        "string": "...x..................x",
        "comment": "..................xx...",
        "bracket": ".xxxxxxxxxxxxxxx.......",
        "indented": "..............xxxxxx...",
    }
    assert np.flatnonzero(~scored).tolist() == [2, 4, 20, 21]
    assert np.flatnonzero(other).tolist() == [21, 22]
