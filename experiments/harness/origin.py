"""The origin of a result: the code that can change it, the commit beside it for people, and the data.

The code is known by a digest of the sources that a run comes to import, from its parts' targets and the harness on,
without comments and docstrings: a mixer that a run does not use may change as it likes.
"""

import ast
import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from experiments.harness.files import write_atomically

ROOT = Path(__file__).parents[2]
ENTRY = "experiments.harness.run"
CHECKPOINTS = {"archs.checkpoints", "archs.checkpoints.likeness"}  # for runs that begin from weights
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# They name, check, keep and show, and compute nothing.
KEEPERS = {
    f"experiments.harness.{name}"
    for name in ("identity", "ledger", "origin", "settings", "progress_bar", "failures", "files", "stopping")
}


@dataclass(frozen=True)
class Origin:
    """code: digest of the sources, 12 hex digits. commit: as git describes it, None without git. data: digest of the
    tokens. threads: of the CPU, which a run that goes on takes again, since other numbers round otherwise. Each is None
    where a row of an older version does not know it."""

    code: str | None
    commit: str | None
    data: str | None
    threads: int | None = None

    @classmethod
    def of_row(cls, row: dict) -> "Origin":
        """Returns what made a row of the ledger."""
        return cls(row.get("code"), row.get("commit"), row.get("data_digest"))

    @classmethod
    def read(cls, path: Path) -> "Origin | None":
        """Returns what `write` wrote, or None where there is nothing that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)))

    def differences(self, present: "Origin") -> str:
        """Returns in words how what made a result differs from what is there now; "" where it does not."""
        found = []
        if self.code != present.code:
            found.append(f"other code ({_version(self)}; now {_version(present)})")
        if self.data != present.data:
            found.append(f"other data (digest {str(self.data)[:12]}; now {str(present.data)[:12]})")
        return " and ".join(found)


def _version(origin: Origin) -> str:
    if origin.code is None:
        return "of a version that kept no digest"
    return f"digest {origin.code}" + (f" of commit {origin.commit}" if origin.commit else "")


def code_digest(identity: dict[str, Any], entry: str = ENTRY) -> str:
    """Returns the digest of the sources that a run of this identity comes to import from `entry` on: of this project,
    and of packages that its `_target_`s name and that are not installed in site-packages."""
    without = KEEPERS if identity.get("init_from") else KEEPERS | CHECKPOINTS
    waiting, sources = [entry, *(_module_of(target) for target in targets(identity))], {}
    while waiting:
        name = waiting.pop()
        if name in sources or name in without or (path := _source(name)) is None:
            continue
        sources[name], imported = _parsed(name, path, path.stat().st_mtime_ns)
        waiting += [name.rpartition(".")[0], *(_module_of(found) for found in imported)]
    return hashlib.sha256(json.dumps(sorted(sources.items())).encode()).hexdigest()[:12]


def targets(node: Any) -> Iterator[str]:
    """Returns the `_target_`s of a config, from the outermost on."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for child in node.values():
            yield from targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from targets(child)


def _module_of(name: str) -> str:
    """The longest beginning of a dotted name that is a module; "" where there is none."""
    while name and _source(name) is None:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def _source(name: str) -> Path | None:
    """The file of a module of this project or of a package beside it; None for what is installed and for no module."""
    top = name.partition(".")[0]
    if not top or top in sys.stdlib_module_names or (folder := _package(top)) is None:
        return None
    path = folder.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _package(top: str) -> Path | None:
    """The folder that a top-level package or module lies in, None for one that is installed."""
    if (ROOT / top).is_dir():
        return ROOT
    found = importlib.util.find_spec(top)
    if found is None or found.origin is None or "site-packages" in found.origin or "dist-packages" in found.origin:
        return None
    origin = Path(found.origin)
    return origin.parents[1] if origin.name == "__init__.py" else origin.parent


@functools.cache
def _parsed(name: str, path: Path, changed: int) -> tuple[str, tuple[str, ...]]:
    """The digest of a source without comments and docstrings, and the dotted names that it imports."""
    tree, imported = ast.parse(path.read_bytes()), []
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            imported += [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(imported)


@functools.cache
def commit() -> str | None:
    """Returns the commit of this project as git describes it, with "-dirty" where files differ; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def older_name(folder: Path) -> Path:
    """Returns the name beside a folder for what is older in it, one that nothing has yet."""
    names = (folder.with_name(f"{folder.name}.older-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
