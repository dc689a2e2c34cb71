"""One training by Lightning, with all that is kept of it."""

import functools
import json
import logging
import math
import platform
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.device_mesh import DeviceMesh

from archs.adapters import merge
from archs.checkpoints.adapter import save
from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.harness import checkpoints, hardware, processes
from experiments.harness.accuracy import accuracy
from experiments.harness.assembly import Prepared, model_on_meta
from experiments.harness.budget import Allocation
from experiments.harness.data_module import DataModule
from experiments.harness.expert_parallel import DealtExperts
from experiments.harness.failures import first_telling_line, forget, keep
from experiments.harness.files import replacing, write_atomically
from experiments.harness.identity import Run
from experiments.harness.memory import peak_memory_bytes
from experiments.harness.parts import build, build_adapter, build_model
from experiments.harness.progress_bar import ProgressBar
from experiments.harness.sharding import join, shard
from experiments.harness.stopping import Checkpoints
from experiments.harness.tasks import score
from experiments.harness.telemetry import Diverged, Telemetry
from experiments.harness.trainer import Trainer
from experiments.harness.training_module import TrainingModule
from experiments.harness.weights import begin_from, save_weights
from objectives.contracts import Objective

log = logging.getLogger(__name__)
EVALUATIONS = "evaluations.jsonl"  # one line per evaluation of a run, the last of a step counts
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Evaluations(L.Callback):
    """Keeps what each evaluation of a run has found."""

    def __init__(self, folder: Path, allocation: Allocation):
        self.path, self.allocation = folder / EVALUATIONS, allocation

    @rank_zero_only
    def on_validation_end(self, trainer, pl_module) -> None:
        step, flops = trainer.global_step, self.allocation.flops_before(trainer.global_step)
        found = {"step": step, "flops": flops, "bits_per_byte": pl_module.bits_per_byte, "tasks": pl_module.scores}
        before = self.path.read_text() if self.path.exists() else ""
        write_atomically(self.path, f"{before}{json.dumps(found)}\n")


def scoring(config: DictConfig, data: TokenData, objective: Objective) -> Callable[[LanguageModel], dict] | None:
    """Returns what scores a model at each evaluation: on the tasks of its data, but where there are none, where it
    writes nothing, and where data.scoring is null; and by its accuracy, where data.accuracy says on how many windows.
    None where neither is asked for."""
    length, settings, windows = (config.data.get(name) for name in ("sequence_length", "scoring", "accuracy"))
    scores: list[Callable[..., dict]] = []
    if data.environment is not None and objective.samplers and settings is not None:
        sampler = build(settings.sampler) if settings.get("sampler") else None
        scores.append(functools.partial(score, prompts=settings.prompts, samples=settings.samples, sampler=sampler))
    if windows is not None:
        scores.append(functools.partial(accuracy, packed=config.data.packed, windows=windows))
    if not scores:
        return None
    asked = {"objective": objective, "data": data, "sequence_length": length}
    return lambda model: {name: found for by in scores for name, found in by(model, **asked).items()}


def choose_threads(run: Run, prepared: Prepared) -> int:
    """Returns the number of threads that the session asks for, or that is best at this moment."""
    if run.session.threads != "auto":
        return run.session.threads
    tokens = prepared.allocation.tokens // prepared.allocation.steps // prepared.trainer.processes
    return hardware.best_threads(run.config.arch.width, tokens, prepared.trainer.devices)


def train(run: Run, data: TokenData, prepared: Prepared, row: dict, threads: int) -> dict:
    """Train and evaluate one run in its folder, from its last checkpoint on where there is one; return its row with
    what was found, or with the reason why it diverged or crashed."""
    torch.set_num_threads(threads)
    forget(run.folder)
    row = row | _planned(run, data, prepared)
    try:
        try:
            return row | _train(run, data, prepared, row)
        except TorchDynamoException as error:
            prepared = _uncompiled(prepared, error)
            row |= {"compiled": False}
            return row | _train(run, data, prepared, row)
    except Diverged as error:
        return row | {"status": "diverged", "error": str(error)}
    except Exception as error:
        message = keep(error, run.folder, run.session.root)
        log.error("run %s failed: %s", run.id, message)
        return row | {"status": "failed", "error": message}


def _uncompiled(prepared: Prepared, error: TorchDynamoException) -> Prepared:
    """Returns a run without compilation, where that was the trainer's own choice, and says so once per process.

    Raises:
        RuntimeError: where it was asked for.
    """
    reason = first_telling_line(error)
    if prepared.trainer.compile != "auto":
        raise RuntimeError(f"trainer.compile=true fails on this machine, take false or auto: {reason}") from error
    warnings.warn(f"runs are trained uncompiled, since compiling fails on this machine: {reason}", stacklevel=2)
    return replace(prepared, compiled=False)


def _planned(run: Run, data: TokenData, prepared: Prepared) -> dict:
    """Returns the part of a row that is known before the first step."""
    allocation, measured, cost = prepared.allocation, prepared.measured, prepared.measured.costs
    return {
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
        "device": hardware.device_name(prepared.device, prepared.trainer.processes),
        "precision": prepared.precision,
        "compiled": prepared.compiled,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
    }


def _train(run: Run, data: TokenData, prepared: Prepared, row: dict) -> dict:
    """Returns the part of a row that is known at the end.

    Raises:
        Diverged: when a loss is no longer finite.
    """
    config, folder = run.config, run.folder
    allocation, measured, settings = prepared.allocation, prepared.measured, prepared.trainer
    cost, peak = measured.costs, hardware.peak_flops(prepared.device, prepared.precision) * settings.processes
    first = processes.rank() == 0
    if first:
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(config))
    L.seed_everything(config.seed, verbose=False)
    place = experts = None
    if settings.sharded:
        model, place = _in_parts(run, measured.objective, prepared.compiled)
    else:
        model = _whole(run, measured.objective)
        if settings.experts > 1:
            experts = DealtExperts(model, settings.experts, prepared.device)
    for block in (*model.blocks, *(ahead.block for ahead in model.ahead)):
        block.recompute = settings.recompute
    module = TrainingModule(
        model,
        measured.objective,
        measured.optimiser,
        prepared.schedule,
        settings.gradient_clip,
        allocation.steps,
        allocation.tokens,
        data.heldout_bytes,
        config.seed,
        scoring(config, data, measured.objective),
        data.group,
        settings.passes,
        place,
        settings.spikes(),
        experts,
        settings.rewinding(),
        settings.clip_logits,
    )
    if prepared.compiled and not settings.sharded:
        model.hidden = torch.compile(model.hidden)  # by now objectives have their copies, which would run this model's
    data_module = DataModule(data, allocation, config.seed, config.data.packed, settings.evaluation_batch)
    logger = TensorBoardLogger(folder, name="", version="")
    telemetry = Telemetry(logger.experiment, allocation, peak, data.decode)
    bar = [ProgressBar(telemetry, allocation.steps, prepared.compiled)] if run.session.progress and first else []
    evaluations = settings.evaluations_in(allocation.flops, measured.evaluation_flops(data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = _trainer(
            prepared, evaluations, logger, [telemetry, Evaluations(folder, allocation), Checkpoints(run), *bar]
        )
        last = processes.from_first(checkpoints.last_good(folder) if first else None)
        if last and last.is_dir() != settings.sharded:
            raise ValueError(
                f"the checkpoint of step {last.stem[5:14]} was written with trainer.strategy="
                f"{'fsdp' if last.is_dir() else 'ddp or on one device'}: go on with that, or remove {last}"
            )
        try:
            trainer.fit(module, data_module, ckpt_path=last)
            if module.evaluated_at < allocation.steps:
                trainer.validate(module, data_module, verbose=False)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes an exit without a word
                raise error.__context__ from None
            raise
        if trainer.global_step < allocation.steps:
            raise KeyboardInterrupt(f"stopped after step {trainer.global_step} of {allocation.steps}")
    logger.log_hyperparams(
        {key: row[key] for key in ("arm", "budget_flops", "params_total", "width", "learning_rate", "seed")},
        {"heldout_bits_per_byte": module.bits_per_byte},
    )
    if first:
        with replacing(folder / "heldout_nats.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, module.heldout_nats)
    if experts is not None:
        experts.join()
    if settings.sharded:
        join(model)
    if first:
        if config.get("adapter"):
            save(model, folder / "adapter")
            merge(model)
        save_weights(model, folder / "model.safetensors")
    speed = allocation.tokens / telemetry.train_seconds
    return {
        "status": "done",
        "bits_per_byte": module.bits_per_byte,
        "bits_per_byte_se": module.bits_per_byte_se,
        "bits_per_byte_data_se": module.bits_per_byte_data_se,
        "bits_per_byte_kind": "exact" if module.exact else "bound",
        "entropy_bits_per_byte": data.heldout_entropy and data.heldout_entropy / math.log(2) / data.heldout_bytes,
        "train_loss": telemetry.train_loss,
        "skipped_steps": module.spikes.steps if module.spikes else None,
        "undone_steps": module.rewinding.undone if module.rewinding else None,
        "clipped_logits": module.logit_clip.clipped if module.logit_clip else None,
        "tasks": module.scores or None,
        "wall_seconds": telemetry.wall_seconds,
        "train_seconds": telemetry.train_seconds,
        "tokens_per_second": speed,
        "peak_memory_bytes": max(processes.from_all(peak_memory_bytes(prepared.device))),
        "mfu": speed * cost.flops_per_token / peak,
    }


def _whole(run: Run, objective: Objective) -> LanguageModel:
    """Returns the model as it begins."""
    model = build_model(run.config, objective)
    if run.init_from is not None:
        begin_from(model, run.init_from)
    adapter = build_adapter(run.config)
    return adapter.adapt(model) if adapter else model


def _in_parts(
    run: Run, objective: Objective, compiled: bool
) -> tuple[LanguageModel, Callable[[LanguageModel, DeviceMesh], None]]:
    """Returns the model on the meta device, and what cuts it and fills it with what `_whole` returns: on the first
    process alone, and on the CPU, all of that is in memory."""
    weights = _whole(run, objective).state_dict() if processes.rank() == 0 else {}
    model = model_on_meta(run.config, objective)
    if compiled:
        for block in model.blocks:
            block.compile()
    return model, functools.partial(shard, weights=weights)


def _strategy(settings: Trainer, objective: Objective) -> Strategy | str:
    if settings.sharded:
        return ModelParallelStrategy(data_parallel_size=settings.processes, tensor_parallel_size=1)
    # No buffer differs between processes: what changes one is summed over them.
    ddp = functools.partial(DDPStrategy, broadcast_buffers=False, find_unused_parameters=not objective.reads_head)
    return ddp() if settings.processes > 1 else "auto"


def _trainer(prepared: Prepared, evaluations: int, logger: Logger, callbacks: list[L.Callback]) -> L.Trainer:
    settings, steps = prepared.trainer, prepared.allocation.steps
    return L.Trainer(
        accelerator=prepared.device.type,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=_strategy(settings, prepared.measured.objective),
        plugins=[TorchElasticEnvironment()] if settings.processes > 1 or settings.sharded else None,
        use_distributed_sampler=False,  # the data module knows whose batches are whose
        precision="bf16-mixed" if prepared.precision == "bf16" else "32-true",
        max_steps=steps,
        max_epochs=1,
        val_check_interval=-(-steps // evaluations),
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=callbacks,
        enable_progress_bar=False,  # these two are callbacks of ours
        enable_checkpointing=False,
        enable_model_summary=False,
    )
