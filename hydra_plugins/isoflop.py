"""The isoFLOP sweeper as a Hydra plugin. Hydra looks for plugins in this namespace package alone, and imports all of
them at every start, so the sweep itself lives in experiments/sweeps/sweeper.py and is imported when it runs."""

from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class IsoFlopSweeper(Sweeper):
    """Plans the cells of `sweep` and hands the missing ones to the configured launcher, stage by stage."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from experiments.sweeps.settings import check_sweep

        given, launcher, loader = self.config, self.launcher, self.loader
        assert given is not None and launcher is not None  # Hydra has called setup

        def compose(overrides: list[str]) -> DictConfig:
            """The config of a run: all but what is the sweep's and Hydra's."""
            config = loader.load_sweep_config(given, [*arguments, *overrides])
            with open_dict(config):
                config.session.root = str(config.session.root)  # it may go by the name of the sweep
                del config.hydra, config.sweep, config.until, config.limit, config.hardware
            return config

        def launch(files: list[Path], needs: list[dict], first: int) -> list[Exception | None]:
            jobs = [
                [f"sweep.cell={quoted(file)}", *(f"sweep.needs.{name}={number(value)}" for name, value in its.items())]
                for file, its in zip(files, needs, strict=True)
            ]
            returns = launcher.launch(jobs, initial_job_idx=first)
            return [job._return_value if job.status is JobStatus.FAILED else None for job in returns]

        config = loader.load_sweep_config(given, arguments)
        check_sweep(config)
        print(f"sweep {config.sweep.name}: {len(config.sweep.arms)} arms", flush=True)
        from experiments.sweeps.sweeper import Sweep  # seconds, for which a mistake need not wait

        Sweep(config, compose, launch, arguments).run()


def number(value: float | None) -> str:
    """A number as the value of a Hydra override."""
    return "null" if value is None else repr(value)


def quoted(path: Path) -> str:
    """A path as the value of a Hydra override."""
    text = str(path.absolute()).replace("'", "\\'")
    return f"'{text}'"
