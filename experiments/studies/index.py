"""The page of all studies: one line each, from what they have written."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from experiments import CONFIGS


def found(results: Path, name: str) -> dict | None:
    """The verdict.json of a study, or None where it has not been run."""
    path = results / name / "verdict.json"
    return json.loads(path.read_text()) if path.exists() else None


def claim_of(name: str) -> str:
    """The claim of a study as its config has it."""
    return OmegaConf.load(Path(CONFIGS, "study", f"{name}.yaml")).study.claim


def listing(results: Path, names: list[str]) -> str:
    """One line per study: its name, its verdict, its claim."""
    width = max(map(len, names))
    lines = []
    for name in names:
        result = found(results, name)
        outcome = "not run yet" if result is None else result["verdict"]["outcome"]
        lines.append(f"{name:{width}}  {outcome:14}  {claim_of(name)}")
    return "\n".join(lines)


def write_index(results: Path, names: list[str]) -> None:
    """Write <results>/README.md."""
    lines = [
        "# Claims and verdicts",
        "",
        "One line per study: `python -m experiments.study name=...` tests one again. The rule of each verdict was",
        "written before its runs and stands in its config, in configs/study; where these are a sweep's, it was written",
        "after them. This page is written by the command.",
        "",
        "| study | claim | verdict | effect | what was found | runs, time |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        result = found(results, name)
        if result is None:
            lines.append(f"| {name} | {claim_of(name)} | not run yet | | | |")
            continue
        verdict, effect = result["verdict"], result["verdict"]["effect"]
        shown = ""
        if effect is not None:
            high = "∞" if effect["high"] is None else f"{effect['high']:.3g}"
            shown = f"{effect['value']:.3g} [{effect['low']:.3g}, {high}]"
        spent = f"{result['runs']}, {result['run_seconds'] / 60:.0f} min" if result["runs"] else "a sweep's"
        links = f"[figure]({name}/figure.png), [table]({name}/table.csv)"
        lines.append(
            f"| {name} | {result['claim']} ({result['source']}) | **{verdict['outcome']}** | {shown} "
            f"| {verdict['sentence']} {links} | {spent} |"
        )
    devices = sorted({d for name in names if (r := found(results, name)) for d in r["devices"]})
    lines += ["", f"Machines: {'; '.join(devices)}." if devices else "", ""]
    (results / "README.md").write_text("\n".join(lines))
