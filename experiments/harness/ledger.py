"""The ledger: one JSON line per run, appended whole or not at all, readable by pandas without this module."""

import functools
import json
import os
import warnings
from pathlib import Path

import pandas as pd

from experiments.harness.files import FULL, full, locked

COLUMNS = [
    *("id", "status", "error", "kind", "arm", "arch", "objective", "data", "data_digest", "init_from"),
    *("optimiser", "schedule", "learning_rate", "seed", "batch_tokens", "sequence_length", "tokens", "steps"),
    *("budget_flops", "flops", "flops_6nd", "flops_per_token"),
    *("params_total", "params_active", "params_non_embedding", "width", "depth", "state_bytes"),
    *("bits_per_byte", "bits_per_byte_se", "bits_per_byte_data_se", "bits_per_byte_kind", "entropy_bits_per_byte"),
    *("train_loss", "skipped_steps", "undone_steps", "clipped_logits", "tasks"),
    *("wall_seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes", "mfu"),
    *("device", "precision", "compiled", "code", "commit", "versions", "started", "finished"),
]
NEEDED = ["id", "status", "kind", "arm"]  # a row of an older version may lack others


def append(path: Path, row: dict) -> None:
    """Append one row, a value for each of COLUMNS. Writers on several processes take turns; a row that does not fit on
    the disk is taken back.

    Raises:
        OSError: when the disk is full, saying so; the ledger is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with locked(Path(f"{path}.lock")), open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            # A row that a crash cut short keeps its line to itself.
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), size)
            if error.errno in FULL:
                raise full(path) from error
            raise


def read(path: Path) -> pd.DataFrame:
    """All good rows of a ledger, as `parse` finds them; a bad one is left in the file."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    return pd.DataFrame(list(parse(content, path).values()), columns=COLUMNS)


def parse(content: bytes, place: object) -> dict[str, dict]:
    """Return the good rows of a ledger by id, the last one where an id stands twice.

    A row that is no JSON object with what makes a row is named in a warning with its line number, once, and skipped.
    """
    rows: dict[str, dict] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = [column for column in NEEDED if column not in row]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing[:5])}")
            rows.pop(row["id"], None)
            rows[row["id"]] = row
        except (ValueError, TypeError) as error:
            _warn_once(f"{place}, line {number}: not a ledger row, skipped ({error})")
    return rows


@functools.cache
def _warn_once(text: str) -> None:
    """Warn of what is found again at every look at a ledger, of which a sweep takes many."""
    warnings.warn(text, stacklevel=4)


def commits(rows: pd.DataFrame) -> str:
    """Returns in words which commits rows are of."""
    known = sorted({str(name) for name in rows.commit.dropna()})
    names = [f"commit {name}" for name in known] + (["no known commit"] if rows.commit.isna().any() else [])
    return ", ".join(names)
