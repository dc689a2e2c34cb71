"""A sweep: planned first, every cell once, whatever happens to it on the way.

Sweeps run in this process, through the command's own `main`, but where a process is to be killed.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import sweep as command
from experiments.harness import identity, ledger, training
from experiments.harness import run as run_module
from experiments.harness.identity import load_config, run_of
from experiments.harness.telemetry import Telemetry
from experiments.sweeps import sweeper as sweeper_module
from experiments.sweeps.worker import Died, Preempted

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
ONE_ARM = "sweep.arms=[{arch:transformer,objective:next_token}]"
SMALL = [
    "sweep=quickstart", "hydra/launcher=basic", "sweep.budgets=[4e7,8e7]", "sweep.sizes=3", "sweep.span=4",
    "sweep.seeds=[0]", "sweep.holdout={budget:1.6e8,sizes:2,span:2}", "sweep.tokens_per_parameter=0.5",
    "sweep.tuning={budgets:[4e7],learning_rates:[0.01,0.02],seeds:[1000],widen:0}",
    "data=hidden_markov", "data.sequence_length=32",
    "sweep.recentre=false", "sweep.widen=0",
    "data.tokens.train_tokens=65536", "data.tokens.heldout_tokens=512", "data.allow_repeats=true",
    "budget.batch_tokens=512",
    "sweep.arms=[{arch:transformer,objective:next_token},{arch:transformer,objective:masked_diffusion}]",
]  # fmt: skip
CELLS = 20


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs the command in this process and returns what it printed; every run must be in the plan before it starts, and
    a held-out one must have been predicted."""
    execute = run_module.execute

    def planned(run):
        assert cell_of(run)
        assert run.session.kind != "holdout" or (run.session.root / "prediction.json").exists()
        return execute(run)

    def run(*overrides):
        argv = ["sweep", *SMALL, f"session.root={tmp_path}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(run_module, "execute", planned)
        command.main()
        return capsys.readouterr().out

    return run


def cells_of(folder):
    plan = json.loads((folder / "plan.json").read_text())
    return [*plan["cells"], *(cell for addition in plan["additions"] for cell in addition["cells"])]


def cell_of(run):
    """The cell of a run in the plan on disk."""
    session, config = run.session, run.config
    place = (session.kind, session.arm, config.budget.flops, config.arch.width, config.seed)
    (cell,) = [
        cell
        for cell in cells_of(session.root)
        if (cell["kind"], cell["arm"], cell["budget"], cell["width"], cell["seed"]) == place
        and cell["learning_rate"] in (None, config.optim.learning_rate)
    ]
    return cell


def without_training(run):
    """Append a row with the loss of a planted law, whose noise is the run's own."""
    cell, session = cell_of(run), run.session
    noise = random.Random(run.id).gauss(0, 0.01)
    loss = 1 + 2 * (cell["flops"] / cell["tokens"] / 6e3) ** -0.4 + 2 * (cell["tokens"] / 1e4) ** -0.4
    rate = run.config.optim.learning_rate
    loss *= math.exp(noise) * (1.1 if session.arm.endswith("diffusion") else 1) * (1 + 0.1 * math.log(rate / 0.05) ** 2)
    ledger.append(run.ledger, dict.fromkeys(ledger.COLUMNS) | {
        "id": run.id, "status": "done", "kind": session.kind, "arm": session.arm, "arch": "", "objective": "",
        "budget_flops": cell["budget"], "flops": cell["flops"], "flops_6nd": cell["flops"], "width": cell["width"],
        "params_total": cell["params"], "tokens": cell["tokens"], "steps": cell["steps"],
        "learning_rate": rate, "seed": cell["seed"],
        "bits_per_byte": loss, "bits_per_byte_se": 0.0, "bits_per_byte_kind": "exact", "wall_seconds": 1.0,
        "train_seconds": 1.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1.0, "state_bytes": 1.0,
        "device": "none", "code": run.code, "versions": {}, "started": "", "finished": str(time.time()),
    })  # fmt: skip


def rows_of(folder):
    return ledger.read(folder / "ledger.jsonl")


class Killed(BaseException):
    """A kill, where one can be counted on."""


def killed_at(monkeypatch, module, name, call):
    """Kill at the call-th call of a function, before it does anything."""
    original, calls = getattr(module, name), []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)


KILLS = {  # in the order in which they come
    "before the plan": (sweeper_module, "write_json", 1),
    "in a training step of the first cell": (Telemetry, "on_train_batch_start", 3),
    "in a training step of a later cell": (Telemetry, "on_train_batch_start", 20),
    "before a row lies beside its run": (run_module, "write_atomically", 2),
    "before a row is in the ledger": (ledger, "append", 2),
    "before the weights are written": (training, "save_weights", 2),
    "before the choice of learning rates is written": (sweeper_module, "write_json", 1),
    "before the prediction": (sweeper_module, "predict", 1),
    "before the report": (sweeper_module.report, "write", 1),
}


def test_a_sweep_killed_anywhere_trains_every_cell_exactly_once(sweep, tmp_path, monkeypatch):
    """One sweep, killed at every one of these places in turn."""
    ends, trained = {}, []
    original = training._train
    for module, name, call in KILLS.values():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, module, name, call)
            sweep(ONE_ARM, "session.checkpoint_seconds=0")
        for row in rows_of(tmp_path).itertuples():
            assert ends.setdefault(row.id, row.finished) == row.finished, "trained again"

    def watch(run, *rest):
        trained.append(run.id)
        return original(run, *rest)

    monkeypatch.setattr(training, "_train", watch)
    output = sweep(ONE_ARM, "session.checkpoint_seconds=0")
    rows, plan = rows_of(tmp_path), json.loads((tmp_path / "plan.json").read_text())
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == len(plan["cells"]) == CELLS // 2
    assert set(rows.status) == {"done"} and "report.html" in output
    assert all(rows.set_index("id").finished[cell] == when for cell, when in ends.items())
    assert not trained, "all was trained before the last kill, which came before the report"
    assert "nothing to train: all 10 cells" in output
    assert (tmp_path / "ledger.jsonl").read_text().splitlines() == lines


@cache  # composing takes longer than all else here
def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("sweep", [*SMALL, *ADAPTIVE, *overrides])


def sweep_without_training(folder, launch=None, settings=()):
    """Run a sweep in a folder without the command, Hydra's launcher and the training of its runs."""

    def compose_run(overrides):
        config = composed(*settings, *overrides).copy()
        config.session.root = str(folder)
        return OmegaConf.masked_copy(config, [key for key in config if key not in ("sweep", "until", "limit")])

    def launch_all(files, needs, first):
        return [without_training(run_of(load_config(file))) for file in files]

    sweeper_module.Sweep(composed(*settings), compose_run, launch or launch_all, []).run()


ADAPTIVE = [
    "sweep.recentre=true", "sweep.widen=2", "sweep.budgets=[2e7,4e7,8e7]", "sweep.sizes=3",
    "sweep.tuning={budgets:[2e7,8e7],learning_rates:[0.01,0.02],seeds:[1000],widen:1}", "until=multiplier within 12 %",
    "limit.flops=1e9",
]  # fmt: skip


def test_a_sweep_that_decides_on_its_way_and_is_killed_at_every_write_decides_the_same(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sweep_without_training(whole)
    stages = [addition["stage"] for addition in json.loads((whole / "plan.json").read_text())["additions"]]
    assert {"learning rates", "sizes", "held-out sizes", "precision"} == set(stages)
    kills, seen = 0, []
    while True:
        with monkeypatch.context() as patch:
            # Whatever is written first is followed by a kill before its cells are run, or before the next is written.
            killed_at(patch, sweeper_module, "Progress" if kills % 2 else "write_json", 2)
            try:
                sweep_without_training(killed)
                break
            except Killed:
                kills += 1
        plan = json.loads((killed / "plan.json").read_text())
        assert plan["additions"][: len(seen)] == seen, "what was decided stays"
        seen = plan["additions"]
    assert kills >= len(stages) // 2
    assert cells_of(killed) == cells_of(whole)
    lines = (killed / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == len(rows_of(killed)) == len(cells_of(whole))


FOUR_CELLS = (
    ONE_ARM, "sweep.tuning=null", "sweep.holdout=null", "sweep.budgets=[4e7]", "sweep.sizes=4", "sweep.recentre=false",
    "sweep.widen=0", "until=null", "limit.flops=null",
)  # fmt: skip


@pytest.mark.parametrize(
    ("deaths", "status", "said"),
    [
        ([], "done", []),
        ([Died("SIGKILL")], "done", ["died and is tried again"]),
        ([Died("SIGKILL"), Died("out of\nmemory")], "failed", ["died and is tried again", "died again"]),
        ([Preempted(), Died("node gone"), Preempted()], "done", ["told to stop", "died and is tried", "told to stop"]),
    ],
    ids=["no death", "one death", "two deaths", "told to stop, which is no death"],
)
def test_a_cell_that_dies_is_tried_again_once_and_then_its_row_says_so(tmp_path, capsys, deaths, status, said):
    left, launches, victims = list(deaths), [], set()

    def launch(files, needs, first):
        launches.append([file.parent.name for file in files])
        ends = []
        for number, file in enumerate(files):
            if left and number == min(1, len(files) - 1):
                victims.add(file.parent.name)
                ends.append(left.pop(0))
            else:
                ends.append(without_training(run_of(load_config(file))))
        return ends

    sweep_without_training(tmp_path, launch, FOUR_CELLS)
    lines, rows = (tmp_path / "ledger.jsonl").read_text().splitlines(), rows_of(tmp_path).set_index("id")
    assert len(lines) == len(rows) == len(cells_of(tmp_path)), "every cell once, whatever else dies"
    assert len(victims) == (1 if deaths else 0)
    for victim in victims:
        assert rows.status[victim] == status and (rows.drop(victim).status == "done").all()
        assert all(launch == [victim] for launch in launches[1 : 1 + len(deaths) - (status == "failed")])
        assert rows.error[victim] == ("out of" if status == "failed" else None)
        assert rows.arm[victim] and rows.params_total[victim] > 0
    output = capsys.readouterr().out
    assert [
        next(words for words in said if words in line) for line in output.splitlines() if line.startswith("run ")
    ] == said


def test_a_cell_that_was_given_up_is_tried_when_the_sweep_is_started_again(tmp_path):
    given_up = []

    def launch(files, needs, first):
        given_up[:] = given_up or [files[0]]
        return [Died("gone") if file in given_up else without_training(run_of(load_config(file))) for file in files]

    sweep_without_training(tmp_path, launch, FOUR_CELLS)
    assert rows_of(tmp_path).status.value_counts().failed == 1
    sweep_without_training(tmp_path, settings=FOUR_CELLS)
    assert set(rows_of(tmp_path).status) == {"done"}


def test_two_sweeps_that_decide_in_one_folder_decide_once(tmp_path):
    """The second begins when the first is about to launch, and so is ahead of it in all that follows."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    sweep_without_training(whole)
    begun = []

    def launch(files, needs, first):
        if not begun:
            begun.append(first)
            sweep_without_training(shared, launch)
        ledgered = set(rows_of(shared).id)  # a worker would find the row of the other
        return [None if file.parent.name in ledgered else without_training(run_of(load_config(file))) for file in files]

    sweep_without_training(shared, launch)
    assert begun and cells_of(shared) == cells_of(whole)
    assert len((shared / "ledger.jsonl").read_text().splitlines()) == len(cells_of(whole))


def test_all_other_runs_take_the_learning_rate_that_tuning_chose(sweep, tmp_path):
    output = sweep()
    for arm, group in rows_of(tmp_path).groupby("arm"):
        tuning = group[group.kind == "tune"]
        best = tuning.loc[tuning.bits_per_byte.idxmin()].learning_rate
        assert set(group[group.kind != "tune"].learning_rate) == {best}
        assert re.search(rf"learning rates: tuning chose .*{best:g} for {re.escape(arm)}", output)


def test_another_plan_is_refused_with_the_difference(sweep, tmp_path, capsys):
    settings = [ONE_ARM, "sweep.tuning=null", "sweep.holdout=null", "sweep.budgets=[4e7]"]
    sweep(*settings)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        sweep(*settings, "sweep.sizes=4")
    said = capsys.readouterr().err
    assert "holds another plan" in said and "cells:" in said and "sweep.name" in said
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


@pytest.mark.thorough
def test_runs_of_other_code_are_refused_accepted_or_put_aside(sweep, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    settings = [ONE_ARM, "sweep.tuning=null", "sweep.holdout=null", "sweep.budgets=[4e7]", f"session.root={folder}"]
    sweep(*settings)
    before = ledger.read(folder / "ledger.jsonl")
    monkeypatch.setattr(identity, "code_digest", lambda config: "0" * 12)
    with pytest.raises(SystemExit):
        sweep(*settings)
    assert re.search("error: 3 of 3 runs in .*mine were made by other code .*=accept goes on", capsys.readouterr().err)
    assert "nothing to train: all 3 cells" in sweep(*settings, "session.older=accept")
    sweep(*settings, "session.older=replace")
    assert ledger.read(folder / "ledger.jsonl").code.tolist() == ["0" * 12] * 3
    assert ledger.read(tmp_path / "mine.older-1" / "ledger.jsonl").code.tolist() == before.code.tolist()


def test_a_dry_run_prints_the_cells_and_runs_nothing(sweep, tmp_path):
    output = sweep("sweep.dry_run=true")
    assert f"{CELLS} cells, nothing is run" in output and "FLOPs in all" in output
    assert "is told from 1 in 80 % of repetitions; 1.05 would take" in output
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "ledger.jsonl").exists()


def test_a_cell_that_diverges_or_crashes_does_not_stop_the_others(sweep, tmp_path, monkeypatch):
    original, crashed = training._train, []

    def crash_once(run, *rest):
        if run.session.kind == "fit" and not crashed:
            crashed.append(run.id)
            raise RuntimeError("out of memory")
        return original(run, *rest)

    settings = [
        ONE_ARM, "sweep.holdout=null", "sweep.tuning={budgets:[4e7],learning_rates:[0.01,1e30],seeds:[1000]}",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", crash_once)
        output = sweep(*settings)
    assert rows_of(tmp_path).status.value_counts().to_dict() == {"done": 6, "diverged": 1, "failed": 1}
    assert re.search("1 diverged.*1 failed.*start", output)
    sweep(*settings)
    assert rows_of(tmp_path).status.value_counts().to_dict() == {"done": 7, "diverged": 1}


def test_a_cell_that_ends_at_sigterm_is_launched_again_and_costs_the_sweep_nothing(sweep, tmp_path, monkeypatch):
    original, stopped = training._train, []

    def stop_twice(run, *rest):
        if len(stopped) < 2:
            stopped.append(run.id)
            raise SystemExit(143)
        return original(run, *rest)

    monkeypatch.setattr(training, "_train", stop_twice)
    output = sweep(ONE_ARM, "sweep.tuning=null", "sweep.holdout=null", "sweep.budgets=[4e7]")
    assert output.count("was told to stop: it goes on from its checkpoint") == 2 and "died" not in output
    assert rows_of(tmp_path).status.value_counts().to_dict() == {"done": 3}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.budgets=[1e3]", "does not pay for one step"),
        ("sweep.holdout.budget=4e7", "must lie above the largest fitted budget"),
        ("until=soon", "until='soon' is not understood"),
        ("sweep.budgets=1e9", "sweep.budgets=1000000000.0 must be a list"),
        ("sweep.budgets=[]", "sweep.budgets=[] must have at least 1 of them"),
        ("sweep.sizes=0", "sweep.sizes=0 must be at least 1"),
        ("sweep.seeds=[]", "sweep.seeds=[] must have at least 1"),
        ("sweep.span=0", "sweep.span=0 must be at least 1"),
        ("sweep.noise=0", "sweep.noise=0 must be above 0"),
        ("sweep.needs.gpus=-1", "sweep.needs.gpus=-1 must be at least 0"),
        ("sweep.name=../../x", "sweep.name='../../x' must match"),
        ("sweep.tuning={budget:1e9}", "sweep.tuning.budget is no setting: did you mean budgets?"),
        ("sweep.arms=[{arch:transformer}]", "sweep.arms[0].objective must be given"),
        ("data.sequence_length=0", "data.sequence_length=0 must be at least 1"),
    ],
)
def test_bad_sweeps_end_with_a_sentence(sweep, tmp_path, capsys, override, words):
    with pytest.raises(SystemExit) as ended:
        sweep(override)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("override", "known"), [("arch=unknown", "gated_delta_hybrid"), ("data=no", "python_stdlib")])
def test_a_misspelt_name_is_answered_with_the_known_ones(sweep, capsys, override, known):
    with pytest.raises(SystemExit):
        sweep(override)
    assert known in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_killed_at_random_moments_loses_nothing(tmp_path):
    """The same with real kills."""
    arguments = [sys.executable, "-m", "experiments.sweep", *SMALL, f"session.root={tmp_path}"]

    def start():
        return subprocess.Popen(
            [*arguments, "session.checkpoint_seconds=0"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    rng, ends = random.Random(), {}
    delays = [rng.uniform(4, 12) for _ in range(3)]  # some kills come before the first cell, some after
    for delay in delays:
        process = start()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for row in rows_of(tmp_path).itertuples():
            assert ends.setdefault(row.id, row.finished) == row.finished, f"trained again, kills after {delays}"
    process = start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    rows = rows_of(tmp_path)
    assert len(rows) == len((tmp_path / "ledger.jsonl").read_text().splitlines()) == CELLS, delays
    assert set(rows.status) == {"done"}
    assert all(rows.set_index("id").finished[cell] == when for cell, when in ends.items())
