"""A thousand cells on a hundred nodes that fail: the real planner, the real ledger and the real sweep, and a clock in
place of the training."""

import heapq
import math
from collections import Counter

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from experiments import CONFIGS
from experiments.harness import ledger
from experiments.harness.identity import run_of
from experiments.report import report
from experiments.sweeps import sweeper
from experiments.sweeps.hardware import makespan
from experiments.sweeps.worker import Preempted

pytestmark = pytest.mark.thorough

NODES, CHECKPOINT, REPAIR = 100, 60.0, 1800.0  # seconds between checkpoints, and of a node until it is back
SETTINGS = [
    "sweep=quickstart", "data=hidden_markov", "data.tokens.train_tokens=65536", "data.tokens.heldout_tokens=512",
    "data.allow_repeats=true", "budget.batch_tokens=65536", "sweep.budgets=[1e15,2e15,4e15,8e15]", "sweep.sizes=5",
    "sweep.span=3", "sweep.recentre=false", "sweep.widen=0", "sweep.holdout=null", "sweep.tokens_per_parameter=20",
    f"sweep.seeds={[*range(25)]}",
    "sweep.tuning={budgets:[1e15],learning_rates:[0.01,0.02,0.04],seeds:[1000],widen:0}",
    "sweep.arms=[{arch:transformer,objective:next_token,overrides:['arch.width_multiple=64']},"
    "{arch:gated_delta_hybrid,objective:next_token,overrides:['arch.width_multiple=64']}]",
]  # fmt: skip


class Killed(BaseException):
    """The sweep's own process is killed."""


class Cluster:
    """Nodes that take one cell each, by a clock; called as a launcher is.

    hours: between failures of a node. preempted: the fraction of them that comes with a warning. kills: times at which
    the process of the sweep is killed. sweep: whose cells they are, once it has begun.
    """

    def __init__(self, hours, preempted, kills=(), seed=0):
        self.mean, self.preempted, self.kills = 3600.0 * hours, preempted, list(kills)
        self.rng = np.random.default_rng(seed)
        self.clock, self.lost, self.work = 0.0, 0.0, Counter()
        self.done, self.tries = Counter(), Counter()
        self.fails_at = [self.rng.exponential(self.mean) for _ in range(NODES)]

    def begin(self, sweep):
        self.sweep = sweep
        self.code = {name: run_of(arm.config).code for name, arm in sweep.arms.items()}

    def __call__(self, files, needs, first):
        assert len(needs) == len(files)
        plan = self.sweep.plan
        cells = {self.sweep.arms[cell.arm].cell_id(cell): cell for cell in rated(plan)}
        free = [(self.clock, node) for node in range(NODES)]
        ends = []  # (time, number, id, death)
        for number, file in enumerate(files):
            begin, node = heapq.heappop(free)
            name = file.parent.name
            end, death = self.train(name, cells[name], begin, node)
            ends.append((end, number, name, death))
            heapq.heappush(free, (end + (REPAIR if death else 0.0), node))
        deaths = [None] * len(files)
        for end, number, name, death in sorted(ends, key=lambda end: end[0]):
            if self.kills and end > self.kills[0]:
                self.clock = self.kills.pop(0)
                with open(self.sweep.ledger, "a") as file:
                    file.write('{"id": "torn')
                raise Killed
            self.tries[name] += 1
            if death is None:
                self.finish(name, cells[name])
            deaths[number] = death
            self.clock = max(self.clock, end)
        return deaths

    def train(self, name, cell, begin, node):
        """Returns when a run ends on a node, and what it died of there."""
        left = seconds(cell) - self.work[name]
        while self.fails_at[node] < begin:
            self.fails_at[node] += self.rng.exponential(self.mean)
        failure = self.fails_at[node] - begin
        if failure >= left:
            return begin + left, None
        warned = self.rng.random() < self.preempted
        kept = failure if warned else failure // CHECKPOINT * CHECKPOINT
        self.work[name] += kept
        self.lost += failure - kept
        return self.fails_at[node], Preempted() if warned else OSError("the node is gone")

    def finish(self, name, cell):
        self.done[name] += 1
        loss = 2 + abs(math.log(cell.learning_rate / 0.02)) + cell.width / 1e4 + cell.seed / 1e6
        row = {"id": name, "status": "done", "kind": cell.kind, "arm": cell.arm, "code": self.code[cell.arm]}
        row |= {"budget_flops": cell.budget, "width": cell.width, "seed": cell.seed, "flops": cell.flops}
        row |= {"params_total": cell.params, "tokens": cell.tokens, "steps": cell.steps, "wall_seconds": seconds(cell)}
        row |= {"learning_rate": cell.learning_rate, "bits_per_byte": loss, "bits_per_byte_se": 0.0}
        ledger.append(self.sweep.ledger, dict.fromkeys(ledger.COLUMNS) | row)


def rated(plan):
    """All cells of a plan, with the learning rates that it has decided on."""
    return [cell.with_rate(plan.rates.get(cell.arm)) for group in plan.groups for cell in group]


def seconds(cell):
    """What a cell takes on a node: its FLOPs at 2e11 per second, and ten minutes."""
    return 600 + cell.flops / 2e11


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns what starts the sweep on a cluster."""
    monkeypatch.setattr(report, "write", lambda folder: [])

    def composed(overrides):
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose("sweep", [*SETTINGS, f"session.root={tmp_path}", *overrides], return_hydra_config=False)
        return config

    def of_run(overrides):
        config = composed(overrides)
        with open_dict(config):
            config.session.root = str(config.session.root)
            for name in ("sweep", "until", "limit", "hardware"):
                del config[name]
        return config

    def start(cluster):
        sweep = sweeper.Sweep(composed([]), of_run, cluster, SETTINGS)
        cluster.begin(sweep)
        sweep.run()
        return sweep

    return start


def test_every_cell_is_trained_once_whatever_nodes_and_the_sweep_itself_do(start, tmp_path, capsys):
    calm = Cluster(hours=math.inf, preempted=0.0)
    plan = start(calm).plan
    cells = rated(plan)
    rows = ledger.read(tmp_path / "ledger.jsonl").sort_values("id", ignore_index=True)
    assert len(rows) == len(cells) == 1006 and set(rows.status) == {"done"} and max(calm.done.values()) == 1
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()

    wild = Cluster(hours=20, preempted=0.3, kills=[calm.clock / 2])
    with pytest.raises(Killed):
        start(wild)
    while len(wild.done) < len(cells):  # again where a cell has died twice
        start(wild)
    again = ledger.read(tmp_path / "ledger.jsonl").sort_values("id", ignore_index=True)
    assert again.equals(rows), "every cell once, with the same result"
    assert max(wild.tries.values()) > 1 and wild.lost > 0
    work = sum(map(seconds, cells))
    assert makespan(map(seconds, cells), NODES) <= calm.clock <= wild.clock
    with capsys.disabled():
        print(
            f"\n{len(cells)} cells, {work / 3600:,.0f} hours of nodes: {calm.clock / 3600:.1f} h on {NODES} that do "
            f"not fail; {wild.clock / 3600:.1f} h where each fails once in 20 h and the sweep is killed once; lost "
            f"{wild.lost / 3600:.1f} h of nodes ({wild.lost / work:.2%})"
        )
