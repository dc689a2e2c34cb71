"""Test a claim: python -m experiments.study name=recall

Without a name it lists all studies with their verdicts. name=... tests one, all=true all of them; what has been run
before is not run again. tiny=true takes a form of seconds, whose numbers mean nothing. Anything else is a Hydra
override, as in name=recall study.steps=500 jobs=1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from experiments import CONFIGS
from experiments.findings import Verdict
from experiments.studies.index import listing, write_index
from experiments.studies.study import Study, carry_out
from experiments.terminal import mistakes_in_a_sentence, nearest, stop, stopped_in_a_sentence

RESULTS = Path("results/studies")


def names() -> list[str]:
    """The studies that there are, by their configs."""
    return sorted(path.stem for path in Path(CONFIGS, "study").glob("*.yaml"))


def run_study(name: str, overrides: list[str], tiny: bool, out: Path) -> Verdict:
    """Carry out one study.

    Raises:
        ValueError: for settings that cannot be run; HydraException and OmegaConfBaseException for overrides that
            do not fit.
    """
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        small = list(compose(f"study/{name}").tiny) if tiny else []

        def whole(more: Sequence[str]) -> DictConfig:
            return compose(f"study/{name}", [*small, *overrides, *more])

        def of_run(more: Sequence[str]) -> DictConfig:
            config = whole(more)
            with open_dict(config):
                del config.study, config.tiny, config.jobs
            return config

        config = whole([])
        study: Study = instantiate(config.study, _convert_="all", _recursive_=False)
        return carry_out(study, study.stages(of_run), config.study, Path(config.session.root), out, config.jobs)


def main(arguments: list[str]) -> None:
    """Run the command with these arguments."""
    own = {"name": None, "all": "false", "tiny": "false", "out": None}
    given = dict(argument.split("=", 1) for argument in arguments if argument.split("=", 1)[0] in own)
    own |= given
    overrides = [argument for argument in arguments if argument.split("=", 1)[0] not in own]
    for name in ("all", "tiny"):
        if own[name] not in ("true", "false"):
            stop(f"{name}={own[name]} must be true or false")
    tiny = own["tiny"] == "true"
    chosen = names() if own["all"] == "true" else [own["name"]] if own["name"] else []
    if unknown := [name for name in chosen if name not in names()]:
        stop(f"name={unknown[0]} is no study{nearest(unknown[0], names())}")
    if overrides and not chosen:
        stop(f"{overrides[0]} is a setting of a study: say which, as name=recall, or all=true")
    results = Path(own["out"]) if own["out"] else Path("runs/tiny") if tiny else RESULTS
    for name in chosen:
        with stopped_in_a_sentence(), mistakes_in_a_sentence():
            verdict = run_study(name, overrides, tiny, results / name)
        print(f"{name}: {verdict.outcome}. {verdict.sentence}\nwritten to {results / name}")
    if chosen and not tiny:
        write_index(results, names())
    if not chosen:
        print(listing(results, names()))


if __name__ == "__main__":
    main(sys.argv[1:])
