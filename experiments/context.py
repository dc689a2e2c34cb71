"""Print what a run makes of its context: python -m experiments.context run=runs/cells/<id> 'lengths=[256,1024]'

That is held-out bits per byte by the position in a window, or by=distance the fraction of answers recalled by the
distance to what is asked for, in windows of each length. The run may have been trained with another.
"""

from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from experiments.harness.weights import load_run
from experiments.studies.by_position import at_length, bits_by_position, recall_by_distance
from experiments.terminal import command, console, given

REPORTS = {"position": bits_by_position, "distance": recall_by_distance}


@command("context")
def main(config: DictConfig) -> None:
    given(config)
    if config.by not in REPORTS:
        raise ValueError(f"by={config.by} must be position or distance")
    run = load_run(Path(config.run), trusted=config.trusted)
    trained = run.config.data.sequence_length
    screen = console()
    for length in config.lengths or [trained]:
        found = REPORTS[config.by](at_length(run, length))
        table = Table(*found.columns, title=f"windows of {length} tokens, trained with {trained}")
        for row in found.itertuples(index=False):
            table.add_row(*(f"{value:.4f}" if isinstance(value, float) else f"{value:,}" for value in row))
        screen.print(table)


if __name__ == "__main__":
    main()
