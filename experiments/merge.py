"""Bring runs of several places together: python -m experiments.merge into=runs/all 'from=[runs/here,s3://mine/there]'

Rows of one run become one, a result before a failure, and the folders of the runs are copied. The last line says what
was taken; a second time takes nothing.
"""

import sys

from omegaconf import DictConfig

from experiments.harness.merging import merge
from experiments.terminal import command, console


@command("merge")
def main(config: DictConfig) -> None:
    sources = [config["from"]] if isinstance(config["from"], str) else list(config["from"])
    merged = merge(str(config["into"]), sources)
    for line in merged.differing:
        print(f"{line}: the later is taken", file=sys.stderr)
    came = ", ".join(f"{number} from {url}" for url, number in merged.taken.items()) or "none from elsewhere"
    console().print(f"{config['into']}: {merged.runs} runs with a result; taken: {came}", markup=False)


if __name__ == "__main__":
    main()
