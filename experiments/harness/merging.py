"""Runs of several places brought together: the union of their rows, one per run, with the folders of these runs.

A place is a folder with a ledger and the folders of its runs, here or on any file system that fsspec knows (s3://...).
Runs are trained into file systems alone; an object store gets them, and gives them back, by a merge.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
from filelock import Timeout
from fsspec.implementations.local import LocalFileSystem

from experiments.harness import checkpoints, ledger
from experiments.harness.files import locked, replacing

OF_SWEEPS = "plan.json", "prediction.json"  # one for all places of a sweep
NOT_COPIED = re.compile(r"lock|running|.*\.(tmp|lock|held)|unfinished\.ckpt")
ORIGIN = "code", "data_digest"


@dataclass(frozen=True)
class Merged:
    """The outcome of a merge. runs: results in the place. taken: by source, the runs that came from there. differing:
    in words, runs whose results are not equal in all places, though of the same code and data."""

    runs: int
    taken: dict[str, int]
    differing: list[str]


class Place:
    """A folder of runs on a file system.

    Raises:
        ValueError: for a file system that is not known, or whose package is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self.files, self.root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be opened: {error}") from error

    @property
    def local(self) -> bool:
        return isinstance(self.files, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        """Returns what a file holds, nothing where there is none."""
        return self.files.cat_file(self.path(name)) if self.files.exists(self.path(name)) else b""

    @cached_property
    def listed(self) -> dict[str, dict]:
        """The rows of the ledger by id."""
        return ledger.parse(self.read("ledger.jsonl"), f"{self.url}/ledger.jsonl")

    @cached_property
    def rows(self) -> dict[str, dict]:
        """The rows by id, with those that lie beside their runs and not, or no longer, in the ledger."""
        beside, paths = [], self.files.glob(self.path("cells/*/row.json"))
        for path, content in (self.files.cat(paths) if paths else {}).items():
            found = ledger.parse(content.replace(b"\n", b" "), path).values()
            beside += [row for row in found if path.endswith(f"/{row['id']}/row.json")]
        return union(self.listed.values(), beside)

    def contents(self, run: str) -> list[str]:
        """Returns the names of the files of a run below its folder, in the order in which they are to be copied: one
        who finds the last has them all."""
        folder = self.path(f"cells/{run}")
        names = [path[len(folder) + 1 :] for path in self.files.find(folder)]
        names = [name for name in names if not NOT_COPIED.fullmatch(name.rpartition("/")[2])]
        return sorted(names, key=lambda name: (name == "row.json", name.endswith(".ckpt"), name))

    def steps(self, run: str) -> int:
        """Returns the step of a run's last checkpoint, -1 where there is none."""
        found = (checkpoints.NAME.fullmatch(name) for name in self.contents(run))
        return max((int(name[1]) for name in found if name), default=-1)

    def take(self, run: str, source: "Place") -> None:
        """Replace the folder of a run by that of another place.

        Raises:
            ValueError: where the run is under way here.
        """
        wanted = source.contents(run)
        if not wanted:
            return
        if not self.local:
            return self._take(run, source, wanted)
        folder = Path(self.path(f"cells/{run}"))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder / "lock", timeout=0):
                self._take(run, source, wanted)
        except Timeout:
            raise ValueError(f"run {run} is under way in {self.url}: wait for it, or stop it, and merge then") from None

    def _take(self, run: str, source: "Place", wanted: list[str]) -> None:
        for name in self.contents(run):
            if name == "row.json" or name not in wanted:
                self.files.rm_file(self.path(f"cells/{run}/{name}"))
        for name in wanted:
            self.copy(f"cells/{run}/{name}", source)

    def copy(self, name: str, source: "Place") -> None:
        """Take a file of another place, whole or not at all."""
        if self.local:
            path = Path(self.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                source.files.get_file(source.path(name), str(temporary))
        elif source.local:
            self.files.put_file(source.path(name), self.path(name))
        else:
            with TemporaryDirectory() as between:
                source.files.get_file(source.path(name), f"{between}/file")
                self.files.put_file(f"{between}/file", self.path(name))

    def add(self, rows: list[dict]) -> None:
        """Add rows to the ledger. On an object store it is written anew, since nothing can be appended there: what
        another merge writes at that moment is found beside its runs by the next."""
        if self.local:
            for row in rows:
                ledger.append(Path(self.path("ledger.jsonl")), row)
        elif rows:
            before = self.read("ledger.jsonl")
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            self.files.pipe_file(self.path("ledger.jsonl"), before + lines.encode())


def union(*tables: Iterable[dict]) -> dict[str, dict]:
    """Return the row of each run that counts, by id: a result (done or diverged) before a failure, the later of two."""
    best: dict[str, dict] = {}
    for table in tables:
        for row in table:
            best[row["id"]] = max(best.get(row["id"], row), row, key=_rank)
    return best


def _rank(row: dict) -> tuple[bool, str, str]:
    """Order of the rows of one run; whole rows last, so that it does not matter which comes first."""
    return row["status"] != "failed", str(row.get("finished") or ""), json.dumps(row, sort_keys=True)


def merge(into: str, sources: list[str]) -> Merged:
    """Bring the runs of several places together in one. What is there stays, unless a later result or the first one
    comes for it; what has no result comes with its checkpoints, where they are further. Once more changes nothing, and
    a merge that was stopped is finished by the next.

    Args:
        into: folder or URL that may hold runs already. sources: folders or URLs; without any, the ledger of `into` is
            completed by the rows that lie beside its runs.

    Raises:
        ValueError: before anything is written for a source without runs, for results of one run that other code or
            other data made, and for places of different sweeps; later for a run that is under way in `into`.
    """
    here, others = Place(into), [Place(url) for url in sources]
    for place in others:
        if not (place.files.exists(place.path("ledger.jsonl")) or place.files.exists(place.path("cells"))):
            raise ValueError(f"from={place.url} holds neither ledger.jsonl nor cells/: name a folder of runs")
    places = [here, *others]
    differing = _compare(places)
    plans = {name: place for name in OF_SWEEPS if (place := _the_only(name, places))}
    best, taken = union(*(place.rows.values() for place in places)), dict.fromkeys(sources, 0)
    for name, place in plans.items():
        if place is not here:
            here.copy(name, place)
    rows = []
    try:
        for run, row in best.items():
            if here.rows.get(run) != row:
                url, source = next((url, p) for url, p in zip(sources, others, strict=True) if p.rows.get(run) == row)
                here.take(run, source)
                taken[url] += 1
            if here.listed.get(run) != row:
                rows.append(row)
    finally:
        here.add(rows)
    for place in others:
        for run in sorted({path.rpartition("/")[2] for path in place.files.glob(place.path("cells/*"))} - set(best)):
            if place.steps(run) > here.steps(run):
                here.take(run, place)
    return Merged(sum(row["status"] != "failed" for row in best.values()), taken, differing)


def _compare(places: list[Place]) -> list[str]:
    """Returns in words which runs have other results in one place than in another.

    Raises:
        ValueError: where other code or other data made them.
    """
    differing, conflicts = [], []
    for run in sorted(set().union(*(place.rows for place in places))):
        found = [(place.url, place.rows[run]) for place in places if run in place.rows]
        found = [(url, row) for url, row in found if row["status"] != "failed"]
        if len({tuple(row.get(column) for column in ORIGIN) for _, row in found}) > 1:
            conflicts.append(f"{run} ({', '.join(url for url, _ in found)})")
        elif len({(row["status"], row.get("bits_per_byte")) for _, row in found}) > 1:
            said = (f"{row['status']} with {row.get('bits_per_byte')} bits per byte in {url}" for url, row in found)
            differing.append(f"run {run}: {'; '.join(said)}")
    if conflicts:
        more = f" and {len(conflicts) - 3} more" if len(conflicts) > 3 else ""
        raise ValueError(
            f"results of other code or other data for one run: {', '.join(conflicts[:3])}{more}; leave out one of "
            "these places, or make its runs again there with session.older=replace"
        )
    return differing


def _the_only(name: str, places: list[Place]) -> Place | None:
    """Returns the first place that has a file, which is the same in all that have it.

    Raises:
        ValueError: where it is not.
    """
    holding = [(place, content) for place in places if (content := place.read(name))]
    for place, content in holding[1:]:
        if json.loads(content) != json.loads(holding[0][1]):
            first = holding[0][0].url
            raise ValueError(f"{first}/{name} and {place.url}/{name} differ: merge places of one and the same sweep")
    return holding[0][0] if holding else None
