"""A run's identity: all of its config but one node, `session`, which says where it lies and how it is watched.

Nothing in `session` reaches what computes a result, and nothing beside it is left out of the identity: a group that
somebody adds to the config is part of it from the first run on. How a run is spread over devices (`SPREAD`, of
`trainer`) only rounds sums otherwise: so that it can go on on another number of them, in its identity stands one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from experiments.harness.origin import code_digest
from experiments.harness.settings import check_parts, check_settings
from experiments.terminal import given, sentence

SESSION = "session"
# How a run is spread, and what stands for it in every identity; None for what stands in none.
SPREAD = {"devices": 1, "nodes": 1, "strategy": "auto", "experts": None, "microbatch": None, "recompute": None}


@dataclass(frozen=True)
class Session:
    """The folder of runs, a run's labels in the ledger, and what is shown and saved on the way.

    root: the run lies in <root>/cells/<id>, its row in <root>/ledger.jsonl.
    kind, arm: labels, by which a sweep finds its runs.
    older: what is done with a result of other code or data: "refuse" it, "accept" it as it is, or "replace" it, which
        puts it aside.
    checkpoint_seconds: time between checkpoints.
    threads: of the CPU, or "auto" for as many as pay for the model and find a free core; they round sums otherwise, as
        another machine does.
    progress: whether the run says on stderr what it is doing.
    """

    root: Path
    kind: str
    arm: str
    older: str
    checkpoint_seconds: float
    threads: int | Literal["auto"]
    progress: bool


@dataclass(frozen=True)
class Run:
    """A run before it is run.

    config: its identity, resolved. init_from: the folder of the weights that it begins with, or None. others: by name
    the folders of the runs whose models its objective asks for. In the config stands what these are, and not where.
    spread: the settings of its trainer that are no part of its identity.
    """

    config: DictConfig
    session: Session
    init_from: Path | None = None
    others: Mapping[str, Path] = field(default_factory=dict)
    spread: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """Hash of the identity, 12 hex digits."""
        return run_id(self.config)

    @functools.cached_property
    def code(self) -> str:
        """Digest of the code that its result depends on."""
        return code_digest(plain(self.config))

    @property
    def folder(self) -> Path:
        return self.session.root / "cells" / self.id

    @property
    def ledger(self) -> Path:
        return self.session.root / "ledger.jsonl"

    @property
    def processes(self) -> int:
        """The number of processes that it asks for, on all nodes."""
        return self.spread.get("devices", 1) * self.spread.get("nodes", 1)


def run_of(config: DictConfig) -> Run:
    """The run that a composed config describes.

    Raises:
        ValueError: for settings that no run can have, and for an `init_from` without weights.
    """
    parts = plain(config)
    check_settings(parts)
    session = parts.pop(SESSION)
    session = Session(**session | {"root": Path(session["root"])})
    trainer = parts["trainer"]
    spread = {name: trainer.pop(name) for name in SPREAD if name in trainer}
    trainer |= {name: alone for name, alone in SPREAD.items() if name in spread and alone is not None}
    init_from = None
    if parts["init_from"] is not None:
        init_from, parts["init_from"] = find_weights("init_from", str(parts["init_from"]), session.root)
    others = {}
    for name, (folder, stands_for) in models_of(parts["objective"], session.root).items():
        others[name], parts["objective"]["models"][name] = folder, stands_for
    run = Run(DictConfig(parts), session, init_from, others, spread)
    if not (run.folder / "row.json").exists():  # else they were good, and importing them takes a second
        check_parts(parts)
    return run


def load_config(path: Path | str) -> DictConfig:
    """A config that was saved."""
    return DictConfig(plain(OmegaConf.load(path)))


def plain(config: DictConfig | ListConfig) -> dict[str, Any]:
    """A config with all that it refers to, in Python's own types.

    Raises:
        ValueError: for what is still to be given (???).
    """
    try:
        return given(config)
    except MissingMandatoryValue as error:
        raise ValueError(sentence(error)) from None


def run_id(config: DictConfig) -> str:
    """Hash of a resolved identity, 12 hex digits."""
    parts = plain(config)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def models_of(objective: Mapping[str, Any], root: Path) -> dict[str, tuple[Path, str]]:
    """By name, the folders of the runs whose models an objective's node asks for, and what stands for them in an
    identity; without those that are null.

    Raises:
        ValueError: for a run without weights.
    """
    asked = objective.get("models", {}).items()
    return {name: find_weights(f"objective.models.{name}", str(run), root) for name, run in asked if run is not None}


def find_weights(setting: str, init_from: str, root: Path) -> tuple[Path, str]:
    """The folder that a setting such as `init_from` names, a run's id in <root>/cells or any folder with weights, and
    what stands for these weights in an identity: the run that made them with the digest of its code, or a digest of
    the files.

    Raises:
        ValueError: when there are no weights.
    """
    for folder in (root / "cells" / init_from, Path(init_from).expanduser()):
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if files:
            row = folder / "row.json"
            if row.exists():
                made = json.loads(row.read_text())
                return folder, "-".join(filter(None, (made["id"], made.get("code"))))
            files += [path for path in [folder / "config.json"] if path.exists()]  # a public checkpoint's
            return folder, digest(tuple(files), tuple(path.stat().st_mtime_ns for path in files))
    raise ValueError(
        f"{setting}={init_from}: neither {root / 'cells' / init_from} nor a folder of that name holds *.safetensors; "
        "give the id of a finished run under session.root, or a folder with weights"
    )


@functools.cache
def digest(files: tuple[Path, ...], changed: tuple[int, ...]) -> str:
    """sha256 of files, read once for each time of change."""
    sha256 = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                sha256.update(block)
    return f"sha256:{sha256.hexdigest()[:24]}"
