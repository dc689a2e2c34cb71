"""The same sweep through every launcher: the same rows, whatever dies on the way."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from experiments.harness import ledger
from experiments.sweeps.needs import Needs, needs_of
from hydra_plugins.isoflop import number
from hydra_plugins.launchers import RayLauncher, SubmititLauncher
from tests.sweeps import slurm
from tests.sweeps.untrained import Untrained

ROOT = Path(__file__).parents[2]
SMALL = [
    "sweep=quickstart", "sweep.arms=[{arch:transformer,objective:next_token}]", "sweep.tuning=null", "sweep.seeds=[0]",
    "sweep.holdout=null", "sweep.recentre=false", "sweep.widen=0", "sweep.budgets=[2e8]", "sweep.sizes=5",
    "sweep.span=4", "sweep.tokens_per_parameter=0.5", "data=hidden_markov", "data.sequence_length=32",
    "data.tokens.train_tokens=65536", "data.tokens.heldout_tokens=512", "data.allow_repeats=true",
    "budget.batch_tokens=512", "session.threads=1", "session.checkpoint_seconds=0",
]  # fmt: skip
CELLS = 5
slow = pytest.mark.slow
by_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes by /proc")


def start(root, *overrides, environment=None):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *SMALL, f"session.root={root}", *overrides],
        env=(environment or os.environ) | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def output_of(process):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


def rows_of(root):
    """The ledger's rows by id, of which no id stands twice."""
    rows = ledger.read(root / "ledger.jsonl")
    assert len(rows) == len((root / "ledger.jsonl").read_text().splitlines())
    return rows.set_index("id").sort_index()


RESULTS = ["status", "bits_per_byte", "train_loss", "flops", "tokens", "steps", "learning_rate", "width"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rows of the sweep whose cells run one after another in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    output_of(start(root, "hydra/launcher=basic"))
    assert len(rows_of(root)) == CELLS
    return rows_of(root)[RESULTS]


@dataclass
class Cluster:
    """overrides, environment: of a sweep that runs there. nodes: what ends a process's node and begins another."""

    overrides: list[str]
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    end_node_of: object = None


@contextmanager
def ray_of_two_nodes():
    """Each runs one cell at a time; the head runs none, and so can stay."""
    from ray.cluster_utils import Cluster as Nodes

    memory = {"object_store_memory": 80_000_000, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    workers = [nodes.add_node(num_cpus=1, **memory) for _ in range(2)]

    def end_node_of(worker):
        parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        (node,) = [node for node in workers if node.all_processes["raylet"][0].process.pid == parent]
        workers.remove(node)
        nodes.remove_node(node, allow_graceful=False)
        workers.append(nodes.add_node(num_cpus=1, **memory))

    try:
        yield Cluster(["hydra/launcher=ray", f"hydra.launcher.address={nodes.address}"], end_node_of=end_node_of)
    finally:
        nodes.shutdown()


@contextmanager
def slurm_of_one_node(folder):
    if why_not := slurm.why_not():
        pytest.skip(why_not)
    with slurm.one_node(folder) as environment:
        needs = ["sweep.needs.memory_gb=1.5", "sweep.needs.minutes=30"]
        yield Cluster(["hydra/launcher=slurm", *needs], environment)


@pytest.fixture(params=["processes", "ray", "submitit", "slurm"])
def cluster(request, tmp_path):
    clusters = {
        "processes": lambda: nullcontext(Cluster(["hydra/launcher=processes", "hydra.launcher.n_jobs=2"])),
        "ray": ray_of_two_nodes,
        "submitit": lambda: nullcontext(Cluster(["hydra/launcher=submitit"])),
        "slurm": lambda: slurm_of_one_node(tmp_path / "slurm"),
    }
    with clusters[request.param]() as found:
        yield found


def workers_of(root):
    """The process that holds the lock of each cell under way, by the cell's id, and the link that says so."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        if cell := cell_of(link, root):
            found[cell] = link
    return found


def cell_of(link, root):
    try:
        match = re.fullmatch(rf"{root}/cells/(\w+)/lock", os.readlink(link))
    except OSError:
        return None
    return match and match[1]


def kill_at_random(process, root, cluster, rng):
    """Kill every cell's worker at most once, at any moment of a sweep, and the first one's node where there are nodes;
    returns the ids of the cells."""
    killed = []
    while process.poll() is None:
        time.sleep(rng.uniform(0.1, 1.5))
        under_way = {cell: link for cell, link in workers_of(root).items() if cell not in killed}
        if not under_way or rng.random() < 0.5:
            continue
        cell = rng.choice(sorted(under_way))
        worker = int(under_way[cell].parts[2])
        if worker != process.pid and cell_of(under_way[cell], root) == cell:  # it may have gone on to another
            if cluster.end_node_of and not killed:
                cluster.end_node_of(worker)
            else:
                os.kill(worker, signal.SIGKILL)
            killed.append(cell)
    return killed


@slow
@by_proc
def test_a_sweep_whose_workers_are_killed_at_random_has_the_rows_of_an_undisturbed_one(cluster, undisturbed, tmp_path):
    seed = random.randrange(10**6)
    root = tmp_path / "runs"
    process = start(root, *cluster.overrides, environment=cluster.environment)
    killed = kill_at_random(process, root, cluster, random.Random(seed))
    output = output_of(process)
    assert killed and output.count("died and is tried again") <= len(killed), (seed, output)
    assert rows_of(root)[RESULTS].equals(undisturbed), (seed, killed, output)


@slow
@by_proc
def test_a_cell_whose_worker_is_killed_every_time_has_a_row_that_says_so_beside_the_others(tmp_path):
    process, victim, killed = start(tmp_path, "hydra/launcher=processes", "hydra.launcher.n_jobs=2"), None, set()
    while process.poll() is None:
        time.sleep(0.05)
        under_way = workers_of(tmp_path)
        victim = victim or next(iter(under_way), None)
        if victim in under_way and (worker := int(under_way[victim].parts[2])) != process.pid:
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
    output, rows = output_of(process), rows_of(tmp_path)
    assert len(killed) == 2 and rows.status.value_counts().to_dict() == {"done": CELLS - 1, "failed": 1}, output
    assert rows.error[victim] == "its process ended with SIGKILL(-9)"
    assert f"run {victim}" in output and "died again" in output and "1 failed" in output


@slow
@by_proc
def test_an_interrupted_sweep_ends_its_workers(cluster, tmp_path):
    process = start(tmp_path / "runs", *cluster.overrides, environment=cluster.environment)
    while not workers_of(tmp_path / "runs"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped: what is finished is kept" in output, output
    for _ in range(100):
        time.sleep(0.2)
        if not workers_of(tmp_path / "runs"):
            return
    raise AssertionError(f"still at work: {workers_of(tmp_path / 'runs')}")


@slow
@by_proc
def test_a_sweep_that_is_killed_leaves_no_worker_behind_and_goes_on(undisturbed, tmp_path):
    process = start(tmp_path, "hydra/launcher=processes", "hydra.launcher.n_jobs=2")
    while not workers_of(tmp_path):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    time.sleep(5)
    assert workers_of(tmp_path) == {}
    output_of(start(tmp_path, "hydra/launcher=processes"))
    assert rows_of(tmp_path)[RESULTS].equals(undisturbed)


@slow
@by_proc
def test_two_sweeps_at_once_in_one_folder_train_every_cell_once(undisturbed, tmp_path):
    both = [start(tmp_path, "hydra/launcher=processes", "hydra.launcher.n_jobs=1") for _ in range(2)]
    for process in both:
        output_of(process)
    assert rows_of(tmp_path)[RESULTS].equals(undisturbed)


def its(overrides):
    return {override.key_or_group: override.value() for override in OverridesParser.create().parse_overrides(overrides)}


NEEDS = {"cpus": 1, "gpus": 1, "small": None, "memory_gb": None, "minutes": 1440, "margin": 3}


def test_a_cell_may_take_the_time_that_finished_runs_of_its_arm_tell_and_before_them_the_given_one():
    sweep = Untrained(tuning=None, recentre=False, widen=0)
    cells = sweep.plan.cells
    assert {needs.minutes for needs in needs_of(cells, OmegaConf.create(NEEDS), sweep.rows)} == {1440}
    sweep.run(cells)
    sweep.rows["wall_seconds"] = 6e-9 * sweep.rows.flops.astype(float)  # 18 to 1440 minutes in three times that
    for cell, needs in zip(cells, needs_of(cells, OmegaConf.create(NEEDS), sweep.rows), strict=True):
        assert needs.minutes == pytest.approx(min(1440, 3 * 6e-9 * cell.flops / 60), rel=0.02, abs=1)
    assert needs_of(cells, OmegaConf.create(NEEDS | {"minutes": 5}), sweep.rows)[-1].minutes == 5


def test_small_models_share_a_gpu_where_that_is_asked_for():
    cells = Untrained(tuning=None, recentre=False, widen=0).plan.cells
    middle = sorted(cell.params for cell in cells)[len(cells) // 2]
    settings = OmegaConf.create(NEEDS | {"small": {"parameters": middle, "gpus": 0.25}})
    rows = Untrained().rows
    for cell, needs in zip(cells, needs_of(cells, settings, rows), strict=True):
        assert needs == Needs(1, 0.25 if cell.params < middle else 1, None, 1440)


def test_what_a_cell_needs_passes_through_hydras_overrides():
    for value in (None, 0.25, 4, 1e-3):
        assert its([f"sweep.needs.gpus={number(value)}"]) == {"sweep.needs.gpus": value}


def test_slurm_is_asked_for_what_the_cell_needs_and_refuses_a_part_of_a_gpu():
    launcher = SubmititLauncher("slurm", "jobs", 10, {"slurm_partition": "small"})
    asked = launcher.asked({"cpus": 4, "gpus": 2, "memory_gb": 16, "minutes": 90})
    assert asked == {
        "name": "cell", "cpus_per_task": 4, "gpus_per_node": 2, "mem_gb": 16, "timeout_min": 90,
        "slurm_additional_parameters": {"no-requeue": True}, "slurm_partition": "small",
    }  # fmt: skip
    with pytest.raises(ValueError, match="asks for 0.25 of a GPU, and submitit gives whole ones"):
        launcher.asked({"cpus": 1, "gpus": 0.25, "memory_gb": None, "minutes": 90})


@pytest.mark.parametrize(
    ("launcher", "extra"), [(RayLauncher(None, {}), "ray"), (SubmititLauncher("slurm", "", 1, {}), "slurm")]
)
def test_a_launcher_whose_package_is_missing_says_what_to_install(monkeypatch, launcher, extra):
    # By the function's own globals: the namespace package that Hydra makes of its plugins need not have this attribute.
    monkeypatch.setitem(launcher.setup.__globals__, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"not installed: pip install 'archipelago.{extra}.'"):
        launcher.setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.thorough
def test_ray_gives_a_cell_its_cpus_its_part_of_a_gpu_and_its_memory(monkeypatch):
    import ray

    launcher = RayLauncher(None, {"include_dashboard": False, "object_store_memory": 80_000_000, "num_gpus": 1})

    def given():
        resources = ray.get_runtime_context().get_assigned_resources()
        return JobReturn(status=JobStatus.COMPLETED, _return_value=resources)

    def launch(**needs):
        monkeypatch.setattr(launcher, "calls", lambda *_: [(given, NEEDS | needs)])
        (job,) = launcher.launch([[]], 0)
        return job.return_value

    try:
        assert launch(gpus=0.25, memory_gb=0.5) == {"CPU": 1, "GPU": 0.25, "memory": 5e8}
        assert launch(gpus=None) == {"CPU": 1, "GPU": 1}, "one where there is any"
        with pytest.raises(ValueError, match="asks Ray for GPU=2 and this machine has 1: set sweep.needs"):
            launch(gpus=2)
    finally:
        ray.shutdown()
