"""The common side of the benchmarks: names that a config asks for, the machine and its versions, tables, and the files
that they go to."""

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Collection, Iterable
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from experiments.harness.hardware import device_name

PACKAGES = (
    "torch", "triton", "transformers", "flash-linear-attention", "flash-qla", "flashinfer-python", "flash-mla",
    "mamba-ssm", "causal-conv1d",
)  # fmt: skip


def check_known(kind: str, asked: Iterable[str], known: Collection[str]) -> None:
    """Check that what a config asks for is there.

    Raises:
        ValueError: for the first name that is none.
    """
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"no {kind} {unknown[0]!r}: choose from {', '.join(known)}")


def environment(device: str) -> dict:
    """Return what a measurement depends on: device, threads, versions, date, and the command that was given."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "date": date.today().isoformat(),
        "command": " ".join(["python -m experiments.bench", *sys.argv[1:]]),
    }


def in_words(where: dict) -> str:
    """Return the environment as the line that stands above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}, Python {where['python']}, {versions}, {where['date']}. `{where['command']}`"


def markdown(cells: pd.DataFrame) -> str:
    """Return a table in Markdown, of the cells as they print, empty where there is nothing."""
    printed = cells.astype(object).where(cells.notna(), "").astype(str)
    lines = [list(cells.columns), ["---"] * cells.shape[1], *printed.values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(out: str | None, device: str, text: str, where: dict, frame: pd.DataFrame) -> None:
    """Write the text to <out>.md, and the rows with the environment to <out>.json.

    Args:
        out: where to, with {device} for the kind of device and {name} for its own; None writes nothing.
        device: "cpu" or "cuda".
        text: the table in Markdown and what it says.
        where: the environment.
        frame: one row per line of the table.
    """
    if out is None:
        return
    stem = Path(out.format(device=device, name=re.sub("[^A-Za-z0-9]+", "-", where["device"]).strip("-")))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.md").write_text(text)
    found = where | {"rows": json.loads(frame.to_json(orient="records"))}
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(found, indent=1) + "\n")
