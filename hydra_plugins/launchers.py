"""Launchers of a sweep's cells, as Hydra plugins: processes of this machine, Ray, and submitit, which is Slurm.

A job that dies takes no other with it, and returns why, as Hydra's FAILED; the jobs carry what they need, the overrides
`sweep.needs.*`. (Hydra's own plugins end at the first death or wait for what they have lost, ask the same for all jobs,
and its Ray plugin cannot be installed beside joblib.) Hydra imports this file at every start, so what a launcher needs
is imported when it is used.
"""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from functools import partial
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from experiments.sweeps.worker import Died

Call = Callable[[], JobReturn]
LOOK_SECONDS = {"local": 0.5, "slurm": 10.0}  # between looks at the jobs of a cluster
HERE = ("ARCHIPELAGO_CACHE",)  # of the environment, for jobs that Ray starts elsewhere


class _Launcher(Launcher):
    """The calls that the workers of a launcher make, with what each needs."""

    package: str  # that it is made of
    extra: str  # of this project, which installs that

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if find_spec(self.package) is None:
            raise ValueError(
                f"this launcher needs {self.package}, which is not installed: pip install 'archipelago[{self.extra}]' "
                f"(in a copy of the repository pip install -e '.[{self.extra}]')"
            )
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def calls(self, jobs: Sequence[Sequence[str]], first: int) -> list[tuple[Call, dict[str, Any]]]:
        """Returns for each job what runs it, anywhere, and what it needs."""
        singletons, parser = Singleton.get_state(), OverridesParser.create()
        environment = {name: os.environ[name] for name in HERE if name in os.environ}
        calls = []
        for number, overrides in enumerate(jobs, start=first):
            given = {override.key_or_group: override.value() for override in parser.parse_overrides(list(overrides))}
            needs = {key.removeprefix("sweep.needs."): value for key, value in given.items() if "sweep.needs." in key}
            call = partial(
                _run, self.hydra_context, self.task_function, self.config, list(overrides), number, singletons,
                os.getcwd(), environment,
            )  # fmt: skip
            calls.append((call, needs))
        return calls


def _run(
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    overrides: list[str],
    number: int,
    singletons: dict,
    folder: str,
    environment: Mapping[str, str],
) -> JobReturn:
    """Run a job in a worker, as if it had been started in that folder of the launcher's machine."""
    os.chdir(folder)
    os.environ.update(environment)
    Singleton.set_state(singletons)
    setup_globals()
    composed = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = f"{composed.hydra.job.name}_{number}", number
    return run_job(
        task_function=task_function,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=hydra_context,
    )


def _died(why: str) -> JobReturn:
    return JobReturn(status=JobStatus.FAILED, _return_value=Died(why))


class ProcessLauncher(_Launcher):
    """Jobs in processes of this machine, which are kept from one to the next. Each is a pool of its own, since a pool
    of several ends all of its processes when one dies.

    Args:
        n_jobs: side by side, as joblib counts them: -1 is one per core.
    """

    package, extra = "joblib", ""  # one of this project's own dependencies

    def __init__(self, n_jobs: int):
        self.n_jobs, self.idle = n_jobs, []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from joblib import cpu_count, effective_n_jobs
        from joblib.externals.loky import ProcessPoolExecutor

        most = effective_n_jobs(self.n_jobs)
        # As joblib divides the cores.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // most)))}

        def submit(call: Call) -> tuple[Future, Any]:
            while self.idle:
                pool = self.idle.pop()
                try:
                    return pool.submit(call), pool
                except BrokenExecutor:  # its process was killed while it had nothing to do
                    pass
            pool = ProcessPoolExecutor(1, env=threads)
            return pool.submit(call), pool

        waiting = deque(enumerate(call for call, _ in self.calls(job_overrides, initial_job_idx)))
        running: dict[Future, tuple[int, Any]] = {}
        returns: dict[int, JobReturn] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    number, call = waiting.popleft()
                    future, pool = submit(call)
                    running[future] = number, pool
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, pool = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenExecutor):
                        code = re.search(r"exit codes? of the workers? \w+ \{(.*?)\}", str(error))
                        returns[number] = _died(f"its process ended with {code[1] if code else error}")
                    else:
                        returns[number] = _died(repr(error)) if error else future.result()
                        self.idle.append(pool)
        finally:
            for _, pool in running.values():  # the sweep is interrupted
                pool.shutdown(wait=False, kill_workers=True)
        return [returns[number] for number in sorted(returns)]


class RayLauncher(_Launcher):
    """Jobs as tasks of Ray, on a cluster that runs or on one of this machine that ends with the sweep.

    Args:
        address: of a cluster that runs, "auto" for the one of this machine, or null.
        local: arguments of `ray.init` where address is null.
    """

    package, extra = "ray", "ray"

    def __init__(self, address: str | None, local: Mapping[str, Any]):
        self.address, self.local = address, dict(local)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not ray.is_initialized():
            self.connect()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        most = {name: max(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory")}
        tasks = []
        for call, needs in self.calls(job_overrides, initial_job_idx):
            gpus = min(1, most["GPU"]) if needs["gpus"] is None else needs["gpus"]
            memory = needs["memory_gb"] and int(needs["memory_gb"] * 1e9)
            asked = {"CPU": needs["cpus"], "GPU": gpus, "memory": memory or 0}
            lacking = [name for name, amount in asked.items() if amount > most[name]]
            if lacking and not self.address:  # another cluster may grow
                raise ValueError(
                    f"a cell asks Ray for {lacking[0]}={asked[lacking[0]]:g} and this machine has "
                    f"{most[lacking[0]]:g}: set sweep.needs, or hydra.launcher.address of a cluster"
                )
            # The sweep itself decides what is tried again.
            options = {"num_cpus": needs["cpus"], "num_gpus": gpus, "memory": memory, "max_retries": 0}
            tasks.append(ray.remote(**options)(_called).remote(call))

        def ended(task: Any) -> JobReturn:
            try:
                return ray.get(task)
            except RayTaskError as error:  # raised by Python: the last line says what
                return _died(str(error).strip().splitlines()[-1])
            except RayError as error:
                return _died(f"{type(error).__name__}: {str(error).strip().splitlines()[0].split('. ')[0]}")

        try:
            return [ended(task) for task in tasks]
        except BaseException:  # the sweep is interrupted
            for task in tasks:
                ray.cancel(task, force=True)
            raise

    def connect(self) -> None:
        """Join or start the cluster."""
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        listening = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        local = {} if self.address else self.local
        ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
        if listening:
            signal.signal(signal.SIGTERM, before)  # which Ray has replaced by its own


def _called(call: Call) -> JobReturn:
    """Ray takes a function and no partial one."""
    return call()


class SubmititLauncher(_Launcher):
    """Each job in a process of its own: of this machine, or a job of Slurm.

    Args:
        cluster: "local" or "slurm".
        folder: for the files of the jobs and their logs, which every node sees.
        at_once: jobs that are queued or run at a time.
        parameters: further ones of submitit, such as slurm_partition.
    """

    package, extra = "submitit", "slurm"

    def __init__(self, cluster: str, folder: str, at_once: int, parameters: Mapping[str, Any]):
        self.cluster, self.folder, self.at_once, self.parameters = cluster, folder, at_once, dict(parameters)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from submitit import AutoExecutor

        calls = self.calls(job_overrides, initial_job_idx)
        asked = [self.asked(needs) for _, needs in calls]
        executor = AutoExecutor(self.folder, cluster=self.cluster)
        waiting = deque(range(len(calls)))
        running: dict[int, Any] = {}
        returns: dict[int, JobReturn] = {}
        gone: set[int] = set()  # at the last look: the file of what they return may be seen later than their end
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    number = waiting.popleft()
                    executor.update_parameters(**asked[number])
                    running[number] = executor.submit(_warned, calls[number][0])
                time.sleep(LOOK_SECONDS[self.cluster])
                ended = {number for number, job in running.items() if job.paths.result_pickle.exists()} | gone
                for number in ended:
                    returns[number] = _returned(running.pop(number))
                alive = self.alive(running)
                gone = {number for number, job in running.items() if job.job_id not in alive}
        finally:
            for job in running.values():  # the sweep is interrupted
                job.cancel(check=False)
        return [returns[number] for number in sorted(returns)]

    def asked(self, needs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what submitit is asked for.

        Raises:
            ValueError: for a part of a GPU.
        """
        gpus = needs["gpus"]
        if gpus and gpus % 1:
            raise ValueError(
                f"sweep.needs asks for {gpus:g} of a GPU, and submitit gives whole ones: ask for those, or take "
                "hydra/launcher=ray"
            )
        asked = {"timeout_min": needs["minutes"], "cpus_per_task": needs["cpus"], "mem_gb": needs["memory_gb"]}
        if self.cluster == "slurm":
            # The sweep itself decides what is tried again.
            asked |= {"gpus_per_node": gpus, "slurm_additional_parameters": {"no-requeue": True}}
        else:
            import torch

            asked |= {"gpus_per_node": torch.cuda.device_count() if gpus is None else gpus}
        return {"name": "cell"} | {name: value for name, value in asked.items() if value} | self.parameters

    def alive(self, running: Mapping[int, Any]) -> set[str]:
        """Returns the ids of jobs that are queued or run. (submitit asks Slurm's accounting, which not all have, and
        waits for a job that was preempted.)"""
        if self.cluster == "local":
            return {job.job_id for job in running.values() if not job.done()}
        listed = subprocess.run(["squeue", "--me", "--noheader", "--format=%i"], capture_output=True, text=True)
        # Where the controller does not answer for a while, nothing has ended.
        return set(listed.stdout.split()) if listed.returncode == 0 else {job.job_id for job in running.values()}


def _warned(call: Call) -> JobReturn:
    """Take the warning that comes before a time limit as the one before any other end."""
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    return call()


def _returned(job: Any) -> JobReturn:
    """Read what a job that has ended returned, or where it stands why it did not."""
    why = "without a result"
    if job.paths.result_pickle.exists():
        try:
            return job.result()
        except Exception:
            why = "with an exception"
    said = (job.stderr() or "nothing is said").strip().splitlines()
    said = [line for line in said if "rror" in line] or said
    return _died(f"job {job.job_id} ended {why} ({said[-1].strip()}): {job.paths.stderr}")
