"""One run: a pure function of its identity, done once and found again by its hash."""

import json
import logging
import math
import os
import platform
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from experiments.data.token_data import TokenData
from experiments.harness import checkpoints, hardware, ledger
from experiments.harness.assembly import Prepared, build_model, open_data, prepare_run
from experiments.harness.checkpoints import Checkpoints, last_good
from experiments.harness.data_module import DataModule
from experiments.harness.identity import Run
from experiments.harness.origin import Origin, commit, older_name
from experiments.harness.telemetry import Diverged, Telemetry
from experiments.harness.training_module import TrainingModule
from experiments.harness.weights import begin_from, save_weights

log = logging.getLogger(__name__)
ORIGIN = "origin.json"  # by what a run was begun
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def execute(run: Run, data: TokenData | None = None) -> dict:
    """Train and evaluate one run in its folder, or find that it is done; return its ledger row.

    A second process with the same run waits for the first and then finds its row. A run that was stopped goes on from
    its last checkpoint. Divergence and crashes give a row that says so.

    Raises:
        ValueError: for a config that cannot be run (see `prepare_run`); nothing is written. For a result, or a
            checkpoint, that other code or other data made, unless session.older says what to do with it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / "lock"), running(run.folder / "running"):
        config = run.config
        data = open_data(config) if data is None else data
        origin = Origin(run.code, commit(), data.digest)
        row, begun = _found(run, origin)
        if row:
            return row
        prepared = prepare_run(config, data)
        if begun is None:
            begun = origin
            origin.write(run.folder / ORIGIN)
        row = {
            "id": run.id,
            "kind": run.session.kind,
            "arm": run.session.arm,
            "started": now(),
            "seed": config.seed,
            "init_from": config.init_from,
            "budget_flops": config.budget.flops,
            "width": config.arch.width,
            "learning_rate": prepared.measured.optimiser.learning_rate,
            "code": begun.code,  # that of its beginning, where an older one was accepted
            "commit": begun.commit,
        }
        row |= {name: config[name].name for name in ("arch", "objective", "data")}
        try:
            row |= _train(run, data, prepared, row)
        except Diverged as error:
            row |= {"status": "diverged", "error": str(error)}
        except Exception as error:
            log.exception("run %s failed", run.id)
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row = {column: row.get(column) for column in ledger.COLUMNS} | {"finished": now()}
        # First beside the run, then in the ledger: a kill between the two loses nothing.
        ledger.write_atomically(run.folder / "row.json", json.dumps(row))
        ledger.append(run.ledger, row)
        return row


def _found(run: Run, origin: Origin) -> tuple[dict | None, Origin | None]:
    """The row that is there already, or what the checkpoints that are there were begun by, as far as the session takes
    what the present code and data did not make."""
    row = finished(run)
    begun = Origin.read(run.folder / ORIGIN) if checkpoints.generations(run.folder) else None
    if row and begun and Origin.of_row(row).differences(begun):
        row = None  # it was put aside, and what replaces it was stopped
    made = Origin.of_row(row) if row else begun
    other = made.differences(origin) if made else ""
    if other and run.session.older == "refuse":
        raise ValueError(
            f"run {run.id} in {run.folder} was {'made' if row else 'begun'} by {other}: session.older=accept takes it "
            "as it is, session.older=replace puts it aside and makes it again"
        )
    if other and run.session.older == "replace":
        put_aside(run)
        return None, None
    return row, begun


@contextmanager
def running(marker: Path):
    """Lets whoever watches the folder count the runs under way."""
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def put_aside(run: Run) -> None:
    """Move what lies in the run's folder, of other code or data, into a folder of its own beside it. The row stays in
    the ledger until another of the same id follows it."""
    aside = older_name(run.folder)
    aside.mkdir()
    for path in run.folder.iterdir():
        if path.name not in ("lock", "running", "cell.yaml"):
            path.rename(aside / path.name)


def finished(run: Run) -> dict | None:
    """The row of a run that is done or diverged, which is its result; a failed one is tried again, and so is one whose
    result is no number."""
    rows = ledger.read(run.ledger)
    rows = rows[rows.id == run.id]
    known = rows.astype(object).mask(rows.isna(), None).to_dict("records")
    beside = run.folder / "row.json"
    if not known and beside.exists():
        row = json.loads(beside.read_text())
        if row["status"] != "failed":
            ledger.append(run.ledger, row)
            known = [row]
    if not known or known[0]["status"] == "failed":
        return None
    bits = known[0]["bits_per_byte"]
    return None if known[0]["status"] == "done" and not (bits and math.isfinite(bits)) else known[0]


def _train(run: Run, data: TokenData, prepared: Prepared, row: dict) -> dict:
    config, folder, session = run.config, run.folder, run.session
    allocation, measured, trainer = prepared.allocation, prepared.measured, prepared.trainer
    device, precision, cost = prepared.device, prepared.precision, prepared.measured.costs
    peak = hardware.peak_flops(device, precision)
    hardware.reset_peak_memory(device)
    row |= {
        "data_digest": data.digest,
        "optimiser": type(measured.optimiser).__name__,
        "schedule": type(prepared.schedule).__name__,
        "flops": allocation.flops,
        "flops_6nd": 6.0 * cost.params_active * allocation.tokens,
        "flops_per_token": cost.flops_per_token,
        "params_total": cost.params_total,
        "params_active": cost.params_active,
        "params_non_embedding": cost.params_non_embedding,
        "depth": measured.depth,
        "tokens": allocation.tokens,
        "steps": allocation.steps,
        "batch_tokens": allocation.tokens / allocation.steps,
        "sequence_length": allocation.sequence_length,
        "state_bytes": cost.state_bytes,
        "device": hardware.device_name(device),
        "precision": precision,
        "compiled": prepared.compiled,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
    }
    OmegaConf.save(config, folder / "config.yaml")

    L.seed_everything(config.seed, verbose=False)
    model = build_model(config, measured.objective)
    if run.init_from is not None:
        begin_from(model, run.init_from)
    if prepared.compiled:
        model.hidden = torch.compile(model.hidden)
    module = TrainingModule(
        model,
        measured.objective,
        measured.optimiser,
        prepared.schedule,
        trainer.gradient_clip,
        allocation.steps,
        allocation.tokens,
        data.heldout_bytes,
        config.seed,
    )
    data_module = DataModule(data, allocation, config.seed, config.data.packed, trainer.evaluation_batch)
    logger = TensorBoardLogger(folder, name="", version="")
    telemetry = Telemetry(logger.experiment, allocation, peak)
    saving = Checkpoints(folder, session.checkpoint_seconds)
    bar = [RichProgressBar()] if session.progress and os.isatty(1) else []
    evaluations = trainer.evaluations_in(allocation.flops, measured.evaluation_flops(data))
    fitting = trainer.lightning(device, precision, allocation.steps, evaluations, logger, [telemetry, saving, *bar])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        fitting.fit(module, data_module, ckpt_path=last_good(folder))
        if fitting.global_step < allocation.steps:
            raise KeyboardInterrupt(f"stopped after step {fitting.global_step} of {allocation.steps}")
        if module.evaluated_at < allocation.steps:
            fitting.validate(module, data_module, verbose=False)
    logger.log_hyperparams(
        {key: row[key] for key in ("arm", "budget_flops", "params_total", "width", "learning_rate", "seed")},
        {"heldout_bits_per_byte": module.bits_per_byte},
    )
    np.save(folder / "heldout_nats.npy", module.heldout_nats)
    save_weights(model, folder / "model.safetensors")
    checkpoints.remove(folder)
    result = {
        "status": "done",
        "bits_per_byte": module.bits_per_byte,
        "bits_per_byte_se": module.bits_per_byte_se,
        "bits_per_byte_data_se": module.bits_per_byte_data_se,
        "bits_per_byte_kind": "exact" if module.exact else "bound",
        "entropy_bits_per_byte": data.heldout_entropy and data.heldout_entropy / math.log(2) / data.heldout_bytes,
        "train_loss": telemetry.train_loss,
        "wall_seconds": telemetry.wall_seconds,
        "train_seconds": telemetry.train_seconds,
        "tokens_per_second": allocation.tokens / telemetry.train_seconds,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
    }
    result["mfu"] = result["tokens_per_second"] * cost.flops_per_token / peak
    return result


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
