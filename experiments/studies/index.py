"""The page of all claims: what was found of each, room by room, from what the studies have written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from omegaconf import OmegaConf

from experiments import CONFIGS
from experiments.findings import StudyOutcome

NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Room:
    """Studies that belong together, and claims that none of them tests -> why not."""

    title: str
    studies: Sequence[str]
    untested: Sequence[dict[str, str]] = ()


def rooms(names: Iterable[str]) -> list[Room]:
    """Return the rooms of configs/claims.yaml with those of the studies that are among the names; what stands in none
    is in the last."""
    left, found = list(names), []
    for entry in cast(list[dict], OmegaConf.to_container(OmegaConf.load(Path(CONFIGS, "claims.yaml")))):
        room = Room(**entry)
        found.append(Room(room.title, [name for name in room.studies if name in left], room.untested))
        left = [name for name in left if name not in room.studies]
    return [*found, Room("Others", left)] if left else found


def result_of(results: Path, name: str) -> dict | None:
    """Return the verdict.json of a study, or None where it has not been run."""
    path = results / name / "verdict.json"
    return json.loads(path.read_text()) if path.exists() else None


def claim_of(name: str) -> str:
    """Return the claim of a study as its config has it."""
    return OmegaConf.load(Path(CONFIGS, "study", f"{name}.yaml")).study.claim


def listing(results: Path, names: list[str]) -> str:
    """Return one line per study: its name, its verdict, its claim."""
    width = max(map(len, names))
    lines = []
    for name in names:
        result = result_of(results, name)
        outcome = NOT_RUN if result is None else result["verdict"]["outcome"]
        lines.append(f"{name:{width}}  {outcome:14}  {claim_of(name)}")
    return "\n".join(lines)


def write_index(results: Path, names: list[str]) -> None:
    """Write <results>/README.md: a table per room, and then every study that was run with its figure."""
    found = {name: result_of(results, name) for name in names}
    lines = [
        "# Claims and verdicts",
        "",
        "What people say about architectures, and what our runs say to it; each verdict is explained further down, by",
        "its figure. `python -m experiments.study name=...` tests one again. The rule of each was written before its",
        "runs and stands in its config, in configs/study; where the runs are those of results/architectures, it was",
        "written after them. Effects are in the units of their explanation. This page is written by the command.",
        "",
        _counts([result["verdict"]["outcome"] for result in found.values() if result]),
    ]
    for room in rooms(names):
        lines += ["", f"## {room.title}", "", "| claim | verdict | effect | runs, time |", "|---|---|---|---|"]
        lines += [_row(name, found[name]) for name in room.studies]
        lines += [f"| {entry['claim']} | not tested | {entry['why']} | |" for entry in room.untested]
    for room in rooms(names):
        for name in room.studies:
            lines += _explained(name, found[name])
    devices = sorted({device for result in found.values() if result for device in result["devices"]})
    lines += ["", f"Machines: {'; '.join(devices)}." if devices else "", ""]
    (results / "README.md").write_text("\n".join(lines))


def _counts(outcomes: list[str]) -> str:
    """How many claims have which verdict."""
    said = ", ".join(f"**{outcome}** {outcomes.count(outcome)}" for outcome in get_args(StudyOutcome))
    return f"Of {len(outcomes)} claims: {said}. Where more seeds would tell, it says how many."


def _row(name: str, result: dict | None) -> str:
    if result is None:
        return f"| {claim_of(name)} | {NOT_RUN} | | |"
    effect, shown = result["verdict"]["effect"], ""
    if effect is not None:
        high = "∞" if effect["high"] is None else f"{effect['high']:.3g}"
        shown = f"{effect['value']:.3g} [{effect['low']:.3g}, {high}]"
    spent = f"{result['runs']}, {result['run_seconds'] / 60:.0f} min" if result["runs"] else "a sweep's"
    return f"| [{result['claim']}](#{name}) | **{result['verdict']['outcome']}** | {shown} | {spent} |"


def _explained(name: str, result: dict | None) -> list[str]:
    if result is None:
        return []
    verdict = result["verdict"]
    return [
        "",
        f"### {name}",
        "",
        f"{result['claim']} ({result['source']}) **{verdict['outcome'].capitalize()}.**",
        "",
        f"{verdict['sentence']}",
        "",
        f"![{name}]({name}/figure.png)",
        "",
        f"[Every run]({name}/table.csv). The rule: {verdict['rule']}",
    ]
