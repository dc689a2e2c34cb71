"""One run: a pure function of its resolved config and seed, done once and found again by its hash."""

import hashlib
import json
import logging
import os
import platform
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from archs.flops import Costs, costs
from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.data.windows import check_enough
from experiments.harness import hardware, ledger
from experiments.harness.budget import Allocation, allocate
from experiments.harness.data_module import DataModule
from experiments.harness.telemetry import Diverged, Telemetry
from experiments.harness.training_module import TrainingModule

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def run_id(config: DictConfig) -> str:
    """Hash of everything in the resolved config that can change the result: 12 hex digits. Where the run lies, how
    often it saves and what it shows are left out."""
    parts = OmegaConf.to_container(config, resolve=True)
    parts = {key: parts[key] for key in ("arch", "objective", "data", "optim", "budget", "seed", "trainer")}
    parts["trainer"] = {key: parts["trainer"][key] for key in ("precision", "compile", "accelerator")}
    parts["data"]["tokens"].pop("cache_dir", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """What a run will be, known before anything is trained."""

    costs: Costs
    allocation: Allocation
    depth: int
    device: torch.device
    precision: str
    compiled: bool


def open_data(config: DictConfig) -> TokenData:
    return instantiate(config.data.tokens)


def build_objective(config: DictConfig, data: TokenData):
    return instantiate(config.objective.build, vocab_size=data.vocab_size, eot=data.eot)


def build_model(config: DictConfig, objective) -> LanguageModel:
    """The backbone with what the objective needs of it: its vocabulary, and parts that it asks for."""
    return instantiate(config.arch.model, vocab_size=objective.model_vocab_size, **objective.model_options)


def measure(config: DictConfig, data: TokenData) -> tuple[Costs, int]:
    """Costs and depth of a run's model, which is built on the meta device.

    Raises:
        ValueError: when backbone and objective, or objective and length, do not go together.
    """
    objective = build_objective(config, data)
    with torch.device("meta"):
        model = build_model(config, objective)
    kind = objective.visibility.kind
    if kind not in model.visibilities:
        raise ValueError(
            f"objective={config.objective.name} needs {kind.value} visibility, and a mixer of "
            f"arch={config.arch.name} can only do {sorted(v.value for v in model.visibilities)}: choose another arch, "
            "or an objective with a visibility that it can do"
        )
    T = config.data.sequence_length
    return costs(model, T, objective.flops(model, T, data.scored)), model.depth


def spend(config: DictConfig, data: TokenData, cost: Costs) -> Allocation:
    """Tokens, steps and batches that the budget pays for.

    Raises:
        ValueError: when it pays for less than one step, or the corpus is shorter than the run and data.allow_repeats is
            false.
    """
    T = config.data.sequence_length
    allocation = allocate(config.budget.flops, cost.flops_per_token, T, config.optim.batch_tokens)
    check_enough(len(data.train), allocation.tokens, config.data.allow_repeats)
    return allocation


def plan(config: DictConfig, data: TokenData) -> Plan:
    """What a run will be. Raises ValueError as `measure` and `spend` do, and for a trainer that is not there."""
    cost, depth = measure(config, data)
    allocation = spend(config, data, cost)
    device = hardware.choose_device(config.trainer.accelerator)
    precision = hardware.choose_precision(config.trainer.precision, device, config.arch.width)
    compiled = hardware.choose_compile(config.trainer.compile, device, allocation.flops)
    return Plan(cost, allocation, depth, device, precision, compiled)


def execute(config: DictConfig, data: TokenData | None = None) -> dict:
    """Train and evaluate one run in <root>/cells/<id>, or find that it is done; return its ledger row.

    A second process with the same run waits for the first and then finds its row. A run that was stopped goes on from
    its last checkpoint. Divergence and crashes give a row that says so.

    Raises:
        ValueError: for a config that cannot be run (see `plan`); nothing is written.
    """
    cell = run_id(config)
    folder = Path(config.root) / "cells" / cell
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(config.root) / "ledger.jsonl"
    with FileLock(folder / "lock"), running(folder / "running"):
        if row := finished(path, folder, cell):
            return row
        data = open_data(config) if data is None else data
        planned = plan(config, data)
        row = {
            "id": cell,
            "kind": config.kind,
            "started": now(),
            "seed": config.seed,
            "budget_flops": config.budget.flops,
        }
        row |= {name: config[name].name for name in ("arch", "objective", "data")}
        row |= {"arm": config.arm, "width": config.arch.width, "learning_rate": config.optim.learning_rate}
        try:
            row |= _train(config, data, planned, folder, row)
        except Diverged as error:
            row |= {"status": "diverged", "error": str(error)}
        except Exception as error:
            log.exception("run %s failed", cell)
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row = {column: row.get(column) for column in ledger.COLUMNS} | {"finished": now()}
        # First beside the run, then in the ledger: a kill between the two loses nothing.
        ledger.write_atomically(folder / "row.json", json.dumps(row))
        ledger.append(path, row)
        return row


@contextmanager
def running(marker: Path):
    """Lets whoever watches the folder count the runs under way."""
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def finished(path: Path, folder: Path, cell: str) -> dict | None:
    """The row of a run that is done or diverged, which is its result; a failed one is tried again."""
    rows = ledger.read(path)
    rows = rows[rows.id == cell].astype(object)
    known = rows.where(rows.notna(), None).to_dict("records")
    if not known and (folder / "row.json").exists():
        row = json.loads((folder / "row.json").read_text())
        if row["status"] != "failed":
            ledger.append(path, row)
            known = [row]
    return known[0] if known and known[0]["status"] != "failed" else None


def _train(config: DictConfig, data: TokenData, planned: Plan, folder: Path, row: dict) -> dict:
    allocation, cost = planned.allocation, planned.costs
    device, precision, compiled = planned.device, planned.precision, planned.compiled
    peak = hardware.peak_flops(device, precision)
    hardware.reset_peak_memory(device)
    row |= {
        "data_digest": data.digest,
        "flops": allocation.flops,
        "flops_6nd": 6.0 * cost.params_active * allocation.tokens,
        "flops_per_token": cost.flops_per_token,
        "params_total": cost.params_total,
        "params_active": cost.params_active,
        "params_non_embedding": cost.params_non_embedding,
        "depth": planned.depth,
        "tokens": allocation.tokens,
        "steps": allocation.steps,
        "batch_tokens": allocation.tokens / allocation.steps,
        "sequence_length": allocation.sequence_length,
        "state_bytes": cost.state_bytes,
        "device": hardware.device_name(device),
        "precision": precision,
        "compiled": compiled,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
    }
    OmegaConf.save(config, folder / "config.yaml", resolve=True)

    L.seed_everything(config.seed, verbose=False)
    objective = build_objective(config, data)
    model = build_model(config, objective)
    if compiled:
        model.hidden = torch.compile(model.hidden)
    module = TrainingModule(model, objective, allocation.steps, config.optim, data.heldout_bytes, config.seed)
    data_module = DataModule(data, allocation, config.seed, config.trainer.evaluation_batch)
    logger = TensorBoardLogger(folder, name="", version="")
    telemetry = Telemetry(logger.experiment, allocation, peak)
    last = folder / "last.ckpt"
    checkpoint = ModelCheckpoint(
        folder,
        filename=last.stem,
        train_time_interval=timedelta(seconds=config.trainer.checkpoint_seconds),
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    show = config.trainer.progress and os.isatty(1)
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=allocation.steps,
        max_epochs=1,
        val_check_interval=-(-allocation.steps // config.trainer.evaluations),
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=[telemetry, checkpoint, *([RichProgressBar()] if show else [])],
        enable_progress_bar=show,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, data_module, ckpt_path=last if last.exists() else None)
        if trainer.global_step < allocation.steps:
            raise KeyboardInterrupt(f"stopped after step {trainer.global_step} of {allocation.steps}")
        if module.evaluated_at < allocation.steps:
            trainer.validate(module, data_module, verbose=False)
    logger.log_hyperparams(
        {key: row[key] for key in ("arm", "budget_flops", "params_total", "width", "learning_rate", "seed")},
        {"heldout_bits_per_byte": module.bits_per_byte},
    )
    np.save(folder / "heldout_nats.npy", module.heldout_nats)
    save_weights(model, folder / "model.safetensors")
    last.unlink(missing_ok=True)
    result = {
        "status": "done",
        "bits_per_byte": module.bits_per_byte,
        "bits_per_byte_se": module.bits_per_byte_se,
        "bits_per_byte_data_se": module.bits_per_byte_data_se,
        "bits_per_byte_kind": "exact" if module.exact else "bound",
        "train_loss": telemetry.train_loss,
        "wall_seconds": telemetry.wall_seconds,
        "train_seconds": telemetry.train_seconds,
        "tokens_per_second": allocation.tokens / telemetry.train_seconds,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
    }
    result["mfu"] = result["tokens_per_second"] * cost.flops_per_token / peak
    return result


def save_weights(model: LanguageModel, path: Path) -> None:
    """Weights and buffers as safetensors, replaced atomically; a tied head is stored once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
