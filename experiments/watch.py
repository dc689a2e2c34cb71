"""Watch a sweep in a browser while it runs: python -m experiments.watch root=runs/quickstart

Beside the sweep, on any machine that sees its folder. The page makes itself again until the report is there.
"""

from pathlib import Path

from omegaconf import DictConfig

from experiments.terminal import command, console


@command("watch")
def main(config: DictConfig) -> None:
    folder, seconds = Path(config.root), float(config.seconds)
    if not seconds > 0:
        raise ValueError(f"seconds={config.seconds} must be above 0")
    from experiments.sweeps.watching import watch  # seconds, for which a mistake need not wait

    screen, said = console(), None
    for state in watch(folder, seconds):
        now = f"open {folder.absolute() / 'watch.html'}" if state else f"waiting for a sweep to begin in {folder}"
        if now != said:
            screen.print(now, markup=False)
            said = now
    screen.print(f"finished: {folder / 'report.html'}", markup=False)


if __name__ == "__main__":
    main()
