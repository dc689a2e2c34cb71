"""Every study of configs/study in its tiny form; what all share: plan, rows, verdict and index."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from experiments import study as command
from experiments.findings import Estimate, StudyOutcome, Verdict, write_json
from experiments.harness import training
from experiments.harness.identity import Run, run_of
from experiments.harness.run import execute
from experiments.studies.index import Room, listing, rooms, write_index
from experiments.studies.study import Cell, Study, carry_out, makers

NAMES = command.names()


def run_tiny(name, tmp_path, *overrides):
    return command.run_study(name, [f"session.root={tmp_path / 'runs'}", *overrides], True, tmp_path / "out")


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_its_tiny_form_runs_ends_in_a_verdict_and_is_not_run_again(name, tmp_path, monkeypatch):
    verdict = run_tiny(name, tmp_path)
    assert verdict.outcome in StudyOutcome.__args__ and verdict.sentence and verdict.rule
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    plan = json.loads((tmp_path / "runs" / "plan.json").read_text())
    assert len(table) >= len(plan["cells"]) and (not plan["cells"] or set(table.status.dropna()) == {"done"})
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert kept["verdict"]["rule"] == plan["rule"] == verdict.rule and kept["planned"] == plan["written"]

    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    again = run_tiny(name, tmp_path)
    assert again == verdict
    assert pd.read_csv(tmp_path / "out" / "table.csv").equals(table)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, columns",
    [
        ("rewinding", {"skipped_steps": {"batches_left_out"}, "undone_steps": {"rewound"}}),
        ("logit_clipping", {"clipped_logits": {"logits_clipped"}}),
    ],
)
def test_a_table_says_what_was_skipped_undone_or_clipped_where_that_was_asked_for(name, columns, tmp_path):
    run_tiny(name, tmp_path, "study.seeds=[0]")
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    for column, variants in columns.items():
        assert set(table.variant[table[column].notna()]) == variants


class Coin(Study):
    """Nothing is trained."""

    def cells(self, compose):
        return []

    def figure(self, table):
        return Figure()

    def verdict(self, table):
        return Verdict("holds", f"{len(table)} sides.", None, self.rule)


@pytest.mark.parametrize("begun", [False, True])
def test_a_rule_can_be_changed_before_the_runs_and_not_after(tmp_path, begun):
    settings, root = OmegaConf.create({}), tmp_path / "runs"
    first = Coin("A coin is fair.", "nobody", "as it falls")
    carry_out(first, first.stages(None), settings, root, tmp_path / "out", 1)
    if begun:
        (root / "ledger.jsonl").write_text("")
    other = Coin("A coin is fair.", "nobody", "as I like it")
    if begun:
        with pytest.raises(ValueError, match="rule differ now: a rule is not changed after the runs"):
            carry_out(other, other.stages(None), settings, root, tmp_path / "out", 1)
    else:
        carry_out(other, other.stages(None), settings, root, tmp_path / "out", 1)


DATA = (
    "data=associative_recall", "data.sequence_length=16", "data.tokens.vocab_size=16", "data.tokens.pairs=[1]",
    "data.tokens.train_sequences=200", "data.tokens.heldout_sequences=8", "optim.weight_decay=0", "budget.flops=2e7",
)  # fmt: skip


@dataclass(frozen=True)
class Relay(Study):
    """Runs of two seeds, each of which another goes on from, and a third from that one."""

    later_rate: float = 0.01

    def stages(self, compose):
        done = yield [Cell({"leg": 0, "seed": seed}, run_of(compose([f"seed={seed}"]))) for seed in (0, 1)]
        for leg in (1, 2):
            cells = []
            for cell in done:
                more = [f"seed={cell.labels['seed']}", f"init_from={cell.run.id}"]
                config = compose([*more, f"optim.learning_rate={self.later_rate}"])
                cells.append(Cell(cell.labels | {"leg": leg}, run_of(config)))
            done = yield cells

    def figure(self, table):
        return Figure()

    def verdict(self, table):
        return Verdict("holds", f"{len(table)} legs.", None, self.rule)


@pytest.fixture
def relay(make_config, tmp_path):
    """Returns settings of the study -> what carrying it out returns, in one folder."""

    def carry(**settings):
        study = Relay("A relay is run.", "nobody", "by its legs", **settings)
        stages = study.stages(lambda overrides: make_config(*DATA, *overrides))
        return carry_out(study, stages, OmegaConf.create({}), tmp_path / "runs", tmp_path / "out", 1)

    return carry


def read_plan(tmp_path):
    return json.loads((tmp_path / "runs" / "plan.json").read_text())


@pytest.mark.thorough
def test_runs_of_a_stage_go_on_from_those_of_the_one_before(relay, tmp_path):
    assert relay().sentence == "6 legs."
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table.leg.tolist() == [0, 0, 1, 1, 2, 2] and set(table.status) == {"done"}
    assert table.flops_before.fillna(0).tolist() == pytest.approx((table.leg * table.flops).tolist(), rel=1e-5)
    for i in range(2, 6):
        config = OmegaConf.load(tmp_path / "runs" / "cells" / table.id[i] / "config.yaml")
        assert config.init_from.partition("-")[0] == table.id[i - 2]


def test_a_model_was_made_by_those_that_it_began_with_and_learnt_from():
    def a_run(number, init_from=None, **others):
        began_with = None if init_from is None else Path("cells", init_from.id)
        return Run(DictConfig({"n": number}), Mock(), began_with, {of: Path("cells", r.id) for of, r in others.items()})

    base, judge, stranger = a_run(0), a_run(1), a_run(2)
    teacher = a_run(3, base, reward=judge)
    student = a_run(4, base, teacher=teacher)
    runs = {run.id: run for run in (base, judge, teacher, student)}
    assert makers([Path("cells", base.id)], runs) == {base.id}
    assert makers([Path("cells", student.id)], runs) == {*runs}
    assert makers([Path("cells", stranger.id)], runs) == set()


@pytest.mark.thorough
def test_the_plan_has_each_stage_before_its_first_run_and_none_is_changed_after_it(relay, tmp_path, monkeypatch):
    planned = []

    def noted(run):
        planned.append(json.dumps(read_plan(tmp_path)))
        return execute(run)

    monkeypatch.setattr("experiments.studies.study.execute", noted)
    relay()
    assert [text.count('"leg": 0') for text in planned] == [2] * 6
    assert [text.count('"leg": 1') for text in planned] == [0, 0, 2, 2, 2, 2]
    assert [text.count('"leg": 2') for text in planned] == [0, 0, 0, 0, 2, 2]
    before = read_plan(tmp_path)
    relay()
    assert read_plan(tmp_path) == before
    with pytest.raises(ValueError, match="the settings of {'leg': 1, 'seed': 0} differ now: a rule is not changed"):
        relay(later_rate=0.02)


@pytest.mark.thorough
def test_nothing_goes_on_from_a_run_that_failed_until_it_is_done(relay, tmp_path, monkeypatch):
    train = training._train

    def broken(run, *rest):
        if run.config.seed == 1:
            raise RuntimeError("out of memory")
        return train(run, *rest)

    monkeypatch.setattr(training, "_train", broken)
    relay()
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table.leg.tolist() == [0, 0, 1, 2] and table.status.tolist() == ["done", "failed", "done", "done"]
    monkeypatch.setattr(training, "_train", train)
    assert relay().sentence == "6 legs."
    assert [len(stage["cells"]) for stage in read_plan(tmp_path)["later"]] == [2, 2]


@pytest.mark.thorough
def test_a_failed_run_is_a_row_and_is_not_measured(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "_train", broken)
    verdict = run_tiny("repeated_data", tmp_path)
    assert verdict.outcome == "cannot tell"
    errors = pd.read_csv(tmp_path / "out" / "table.csv").error
    assert all(error.startswith("RuntimeError: out of memory (all of it in cells/") for error in errors)


@pytest.mark.parametrize(("high", "shown"), [(1.8, "1.5 [1.2, 1.8]"), (math.inf, "1.5 [1.2, ∞]")])
def test_the_page_has_one_row_per_study_and_explains_those_that_were_run(tmp_path, high, shown):
    (tmp_path / "recall").mkdir()
    result = {
        "claim": "c", "source": "s", "planned": "", "runs": 3, "run_seconds": 120, "devices": ["cpu"],
        "verdict": Verdict("holds", "It does.", Estimate(1.5, 1.2, high), "r"),
    }  # fmt: skip
    write_json(tmp_path / "recall" / "verdict.json", result)
    write_index(tmp_path, NAMES)
    page = (tmp_path / "README.md").read_text()
    assert page.count(f"| [c](#recall) | **holds** | {shown} | 3, 2 min |") == 1 == page.count("### recall\n")
    assert "Of 1 claims: **holds** 1, **does not hold** 0, **cannot tell** 0." in page
    assert page.count("| not run yet |") == len(NAMES) - 1 and page.count("](recall/figure.png)") == 1
    assert len(listing(tmp_path, NAMES).splitlines()) == len(NAMES)


def test_every_study_stands_in_one_room_and_one_that_stands_in_none_comes_last():
    known = [name for room in rooms(NAMES) for name in room.studies]
    assert sorted(known) == NAMES, "name it in configs/claims.yaml, once"
    assert rooms([*NAMES, "new"])[-1] == Room("Others", ["new"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["name=x"], "name=x is no study: choose one of"),
        (["nmae=recall"], "nmae=recall is a setting of a study: say which"),
        (["all=maybe"], "all=maybe must be true or false"),
        (["name=recall", "tiny=true", "study.stepps=3"], "stepps"),
        (["name=recall", "tiny=true", "study.curves.mamba2.pattern=[convolution]"], "has a mixer 'convolution'"),
    ],
)
def test_the_command_answers_mistakes_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in capsys.readouterr().err


def test_without_a_name_the_command_lists_all_studies(capsys):
    command.main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES
