"""Training on several processes: started here by PyTorch's launcher, or from outside by torchrun."""

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from experiments.data.token_data import TokenData
from experiments.harness import processes
from experiments.harness.assembly import Prepared, prepare_run
from experiments.harness.failures import shortened
from experiments.harness.identity import Run
from experiments.harness.parts import open_data

HERE = "localhost"
TASK, FOUND, FAILED = "task", "found", "failed-"  # files between the launcher and its processes


class Failed(RuntimeError):
    """The row of a run that failed in one of its processes, as JSON."""


def started(run: Run) -> bool:
    """Returns whether this is one of several processes, which torchrun has started for this run.

    Raises:
        ValueError: where they are not as many as the run asks for, or it asks for several nodes and there are none.
    """
    there, nodes = int(os.environ.get("WORLD_SIZE", 1)), run.spread.get("nodes", 1)
    asked = f"trainer.devices={run.spread.get('devices', 1)} and trainer.nodes={nodes}"
    if there > 1 and there != run.processes:
        raise ValueError(f"{asked} ask for {run.processes} processes, and torchrun has started {there} (WORLD_SIZE)")
    if there == 1 and nodes > 1:
        raise ValueError(f"{asked}: start it on each node with torchrun (docs/large_runs.md), or take trainer.nodes=1")
    return there > 1


def together(run: Run, data: TokenData | None, device: torch.device, lead: Callable[[], dict]) -> dict:
    """Return the row of a run on each of the processes that were started for it, of which the first leads, and the
    others wait for what there is to be done."""
    with processes.group(device, int(os.environ["LOCAL_RANK"])):
        if processes.rank() > 0:
            while "row" not in (order := processes.from_first({})):
                _take_part(run, data, **order)
            return order["row"]
        row = lead()
        if row["status"] != "failed":  # else the others may wait for a step that never comes: torchrun ends them
            processes.from_first({"row": row})
        return row


def train(run: Run, data: TokenData | None, prepared: Prepared, row: dict, threads: int) -> dict:
    """Train and evaluate one run on all of its processes, as `training.train` does on one; return its row.

    data: what is to be handed to the processes, or None where each opens it for itself.
    """
    if started(run):
        processes.from_first({"begun": row, "threads": threads})
        return _take_part(run, data, row, threads)
    with tempfile.TemporaryDirectory() as folder:
        # Commands and a file, since what multiprocessing starts from within a worker of joblib hangs.
        (Path(folder) / TASK).write_bytes(pickle.dumps((run, data, prepared.device, row, threads)))
        code = f"import sys; sys.path[:0] = {sys.path!r}; from {__name__} import work; work({folder!r})"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=prepared.trainer.devices,
            run_id=run.id,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{HERE}:0",
            local_addr=HERE,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-c", code)
            return json.loads((Path(folder) / FOUND).read_text())
        except SignalException as error:
            raise KeyboardInterrupt(str(error)) from None
        except ChildFailedError as error:
            # The process that failed first, since the others fail because it is gone, and may be seen to end before it.
            if rows := sorted(Path(folder).glob(f"{FAILED}*"), key=lambda path: path.stat().st_mtime_ns):
                return json.loads(rows[0].read_text())
            message: Any = error.get_first_failure()[1].message  # a dictionary of an exception, a text of a signal
            message = message["message"] if isinstance(message, dict) else message
    return row | {
        "status": "failed",
        "error": shortened(f"a process of the run ended: {message.strip().splitlines()[-1]}"),
    }


@record
def work(folder: str) -> None:
    """Take part in the run of a launcher's folder, as one of its processes."""
    run, data, device, row, threads = pickle.loads((Path(folder) / TASK).read_bytes())
    with processes.group(device, int(os.environ["LOCAL_RANK"])):
        try:
            row = _take_part(run, data, row, threads)
        except Failed as error:
            (Path(folder) / f"{FAILED}{processes.rank()}").write_text(str(error))
            raise
        if processes.rank() == 0:
            (Path(folder) / FOUND).write_text(json.dumps(row))


def _take_part(run: Run, data: TokenData | None, begun: dict, threads: int) -> dict:
    """
    Raises:
        Failed: so that this process ends, and with it the others.
    """
    data = open_data(run.config) if data is None else data
    from experiments.harness import training  # Lightning, which looks when it is imported which process this is

    row = training.train(run, data, prepare_run(run, data), begun, threads)
    if row["status"] == "failed" and not (processes.rank() == 0 and started(run)):
        raise Failed(json.dumps(row))
    return row
