"""Context extension: what begins with what, under which positions, and the verdict that follows."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments import study as command
from experiments.studies.context_extension import ContextExtension

TASKS = {
    "text": {"overrides": [], "tokens": 1, "depth": 1, "seeds": [0, 1, 2], "reports": "bits"},
    "recall": {"overrides": [], "tokens": 1, "depth": 1, "seeds": [0], "reports": "recall"},
}
STUDY = ContextExtension(
    "c", "s", "r", trained=4, lengths=[8, 16], share=0.1, extension=[], curves={"as is": {}, "yarn": {}}, tasks=TASKS,
    compared=["yarn", "as is"],
)  # fmt: skip


def table(text, recall=(), trained=16):
    """Rows of the extension of text by curve and seed, of recall by curve, and others that do not count."""
    rows = [("text", name, trained, seed, x) for name, xs in text.items() for seed, x in enumerate(xs)]
    rows += [("text", name, 8, 0, 9.0 - 8 * (name == "yarn")) for name in text]
    rows += [("recall", name, trained, 0, x) for name, x in dict(recall).items()]
    return pd.DataFrame(rows, columns=["task", "curve", "trained", "seed", "far"]).assign(status="done")


@pytest.mark.parametrize(
    ("yarn", "outcome"),
    [
        ([2.0, 2.3, 2.49], "holds"),
        ([2.2, 2.5, 2.71], "does not hold"),
        ([2.0, 2.5, 2.6], "cannot tell"),
        ([2.0], "cannot tell"),
    ],
)
def test_the_longest_windows_of_text_are_compared_seed_by_seed(yarn, outcome):
    verdict = STUDY.verdict(table({"as is": [2.1, 2.4, 2.6], "yarn": yarn}))
    assert verdict.outcome == outcome and verdict.rule == "r"
    assert (verdict.effect is None) == (len(yarn) == 1)


def test_the_sentence_has_every_curve_and_its_recall():
    text = {"as is": [2.1, 2.4, 2.6], "yarn": [2.0, 2.3, 2.49], "other": [3.0, 3.0, 3.0]}
    verdict = STUDY.verdict(table(text, recall={"as is": 0.25, "yarn": 0.75}))
    assert "as is 2.367, yarn 2.263" in verdict.sentence and "as is 0.25, yarn 0.75" in verdict.sentence


def test_what_was_not_finished_is_left_out():
    rows = table({"as is": [2.1, 2.4, 2.6, 2.0], "yarn": [2.0, 2.3, 2.49, 9.0]})
    rows.loc[(rows.seed == 3) & (rows.curve == "yarn"), ["status", "far"]] = "diverged", None
    assert STUDY.verdict(rows).outcome == "holds"
    assert STUDY.verdict(rows[rows.curve != "yarn"]).outcome == "cannot tell"


@pytest.mark.thorough
def test_each_extension_begins_with_its_backbone_under_its_own_positions(tmp_path):
    command.run_study("context_extension", [f"session.root={tmp_path}"], True, tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    begun = rows[rows.trained == 32].drop_duplicates("id").set_index(["task", "curve"])
    assert sorted(begun.index) == [(t, c) for t in ("recall", "text") for c in ("gated_delta_hybrid", "rotary")]
    later = rows[rows.trained > 32]
    assert len(later) == 3 * 2 * (2 + 1)
    for row in later.itertuples():
        config = OmegaConf.load(tmp_path / "cells" / row.id / "config.yaml")
        first = begun.loc[row.task, "gated_delta_hybrid" if row.curve == "gated_delta_hybrid" else "rotary"]
        assert config.init_from.partition("-")[0] == first.id and config.data.sequence_length == row.length
        scaling = config.arch.model.mixers.attention.position.get("scaling")
        assert (scaling and (scaling.factor, scaling.original_length)) == (
            (row.length / 32, 32) if row.curve == "yarn" else None
        )
        assert row.flops_before == pytest.approx(first.flops) and row.flops < first.flops
        assert row.tokens <= 0.3 * 2000
    ends = rows[(rows.task == "text") & (rows.trained == 128)]
    assert (ends.far != ends.near).all() and ends["@64"].notna().all()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["cells"]) == 4 and [len(stage["cells"]) for stage in plan["later"]] == [18]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("study.compared=[yarn,abf]", "study.compared=abf is no curve: choose from rotary, yarn"),
        ("study.curves.yarn.text=[atention+mlp]", "curve 'yarn' has a mixer 'atention': choose from attention"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        command.run_study("context_extension", [f"session.root={tmp_path}", override], True, tmp_path / "out")
