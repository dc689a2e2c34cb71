"""The isoFLOP sweeper as a Hydra plugin. Hydra looks for plugins in this namespace package alone, and imports all of
them at every start, so the sweep itself lives in experiments/scaling/sweeper.py and is imported when it runs."""

import sys

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class IsoFlopSweeper(Sweeper):
    """Plans the cells of `sweep` and hands the missing ones to the configured launcher, stage by stage."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from experiments.scaling.sweeper import Sweep

        def compose(overrides: list[str]) -> DictConfig:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, [*arguments, *overrides])
            with open_dict(config):
                del config.hydra
            return config

        def launch(cells: list[list[str]], first: int) -> None:
            self.launcher.launch([[*arguments, *overrides] for overrides in cells], initial_job_idx=first)

        try:
            sweep = Sweep(compose, launch, arguments)
        except ValueError as error:  # a plan that cannot be made, or is not the one on disk
            sys.exit(f"error: {error}")
        sweep.run()
