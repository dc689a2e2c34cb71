"""Runs of several places become the runs of one: nothing is lost, doubled or made up, wherever the places lie."""

import errno
import fcntl
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness import ledger, merging
from experiments.harness.files import locked
from experiments.harness.merging import Place, merge, union
from experiments.harness.run import execute


def row(name, status="done", finished="1", **values):
    found = {"id": name, "status": status, "finished": finished, "code": "c", "data_digest": "d"}
    return dict.fromkeys(ledger.COLUMNS) | found | values


rows = st.builds(
    row,
    name=st.sampled_from("abc"),
    status=st.sampled_from(["done", "diverged", "failed"]),
    finished=st.sampled_from("123"),
    bits_per_byte=st.sampled_from([1.0, 2.0]),
)
tables = st.lists(rows, max_size=6)


@given(tables, tables, tables)
def test_the_union_does_not_depend_on_order_and_adds_nothing_twice(a, b, c):
    together = union(a, b, c)
    assert union(c, b, a) == together == union(union(a, b).values(), c) == union(together.values(), a, b, c)
    everything = [*a, *b, *c]
    assert together.keys() == {each["id"] for each in everything}
    for name, taken in together.items():
        others = [each for each in everything if each["id"] == name]
        assert taken in others
        results = [each for each in others if each["status"] != "failed"]
        assert taken["finished"] == max(each["finished"] for each in results or others)
        assert (taken["status"] == "failed") == (not results)


class Store:
    """A place that is made by hand, on any file system."""

    def __init__(self, url):
        self.url = url
        self.files, self.root = fsspec.url_to_fs(url)

    def put(self, name, text):
        self.files.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
        self.files.pipe_file(f"{self.root}/{name}", text.encode())

    def add(self, run, listed=True, **files):
        name = run["id"]
        for file, text in ({"model.safetensors": f"weights of {run['finished']}"} | files).items():
            self.put(f"cells/{name}/{file.replace('__', '.')}", text)
        self.put(f"cells/{name}/row.json", json.dumps(run))
        if listed:
            path = f"{self.root}/ledger.jsonl"
            before = self.files.cat_file(path).decode() if self.files.exists(path) else ""
            self.put("ledger.jsonl", before + json.dumps(run) + "\n")
        return self

    def weights(self, name):
        return self.files.cat_file(f"{self.root}/cells/{name}/model.safetensors").decode()

    def statuses(self):
        return {name: each["status"] for name, each in Place(self.url).listed.items()}

    def snapshot(self):
        kept = [path for path in self.files.find(self.root) if not path.endswith("lock")]
        return {path: self.files.cat_file(path) for path in kept}


@pytest.fixture(params=["file", "memory"])
def stores(request, tmp_path):
    """Returns a name -> a place on a disk or in an object store."""
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.find("/") else None
    return lambda name: Store(str(tmp_path / name) if request.param == "file" else f"memory://{name}")


def test_the_union_of_rows_and_folders_is_in_one_place_and_again_changes_nothing(stores, tmp_path):
    here = Store(str(tmp_path / "here")).add(row("mine")).add(row("both", "failed")).add(row("newer", finished="3"))
    there = stores("there").add(row("theirs", "diverged")).add(row("both")).add(row("newer", finished="2"))
    merged = merge(here.url, [there.url])
    assert here.statuses() == {"mine": "done", "both": "done", "newer": "done", "theirs": "diverged"}
    assert (merged.runs, merged.taken, merged.differing) == (4, {there.url: 2}, [])
    assert here.weights("newer") == "weights of 3" and here.weights("theirs") == "weights of 1"
    before = here.snapshot()
    assert merge(here.url, [there.url]).taken == {there.url: 0} and here.snapshot() == before


def test_a_store_gets_the_runs_and_gives_them_back(stores, tmp_path):
    here, store = Store(str(tmp_path / "here")), stores("store")
    for name in "abc":
        here.add(row(name))
    here.put("plan.json", "{}")
    merge(store.url, [here.url])
    again = Store(str(tmp_path / "again"))
    merge(again.url, [store.url])
    assert again.statuses() == here.statuses() == store.statuses() and again.weights("b") == "weights of 1"
    assert Place(again.url).read("plan.json") == b"{}"


def test_a_ledger_is_completed_by_the_rows_beside_its_runs(tmp_path):
    here = Store(str(tmp_path / "here")).add(row("a")).add(row("b"), listed=False)
    here.add(row("c"), listed=False)
    shutil.copytree(tmp_path / "here" / "cells" / "c", tmp_path / "here" / "cells" / "c.older-1")
    (tmp_path / "here" / "cells" / "c.older-1" / "row.json").write_text(json.dumps(row("c", finished="9")))
    assert merge(here.url, []).runs == 3
    assert Place(here.url).listed["c"]["finished"] == "1", "what was put aside is not the run"


@settings(max_examples=25, deadline=None)
@given(found=st.tuples(tables, tables, tables))
def test_whatever_lies_in_three_places_is_in_one_afterwards_in_whatever_order_it_came(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    places = [Store(str(folder / name)) for name in "abc"]
    for place, table in zip(places, found, strict=True):
        place.put("cells/none/lock", "")
        for each in table:
            place.add(each)
    urls = [place.url for place in places]
    one, other = (Store(str(folder / name)) for name in ("one", "other"))
    merge(one.url, urls)
    for url in [*reversed(urls), *urls]:
        merge(other.url, [url])
    assert Place(one.url).listed == Place(other.url).listed == union(*(Place(url).rows.values() for url in urls))
    for name, row in Place(one.url).listed.items():
        assert one.weights(name) == other.weights(name) == f"weights of {row['finished']}"


@pytest.mark.parametrize("column", ["code", "data_digest"])
def test_results_of_other_code_or_data_are_refused_by_name_before_anything_is_written(tmp_path, column):
    here = Store(str(tmp_path / "here")).add(row("a")).add(row("b"))
    there = Store(str(tmp_path / "there")).add(row("a", finished="2", **{column: "other"})).add(row("c"))
    before = here.snapshot()
    with pytest.raises(ValueError, match=r"other code or other data for one run: a \(.*here, .*there\); leave out"):
        merge(here.url, [there.url])
    assert here.snapshot() == before


def test_results_that_differ_by_rounding_are_named_and_the_later_is_taken(tmp_path):
    here = Store(str(tmp_path / "here")).add(row("a", bits_per_byte=2.5))
    there = Store(str(tmp_path / "there")).add(row("a", finished="2", bits_per_byte=2.5001))
    (said,) = merge(here.url, [there.url]).differing
    assert "run a: done with 2.5 bits per byte in" in said and "2.5001" in said
    assert Place(here.url).listed["a"]["bits_per_byte"] == 2.5001 and here.weights("a") == "weights of 2"


@pytest.mark.parametrize("name", ["plan.json", "prediction.json"])
def test_places_of_different_sweeps_are_refused(tmp_path, name):
    here, there = (Store(str(tmp_path / place)).add(row("a")) for place in ("here", "there"))
    here.put(name, '{"of": 1}')
    there.put(name, '{"of": 2}')
    with pytest.raises(ValueError, match=f"{name} and .*{name} differ"):
        merge(here.url, [there.url])


def test_places_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="from=.*nowhere holds neither ledger.jsonl nor cells/"):
        merge(str(tmp_path), [str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="nothing://x cannot be opened: Protocol not known"):
        merge("nothing://x", [])


class Killed(BaseException):
    """A kill, where one can be counted on."""


def test_a_merge_that_is_killed_at_any_copy_is_finished_by_the_next(stores, tmp_path, monkeypatch):
    there = stores("there").add(row("a"), heldout__npy="1").add(row("b", finished="2"))
    whole = Store(str(tmp_path / "whole")).add(row("b", finished="1"), older__txt="of the older run")
    shutil.copytree(whole.root, tmp_path / "killed")
    merge(whole.url, [there.url])
    killed = Store(str(tmp_path / "killed"))
    for call in range(1, 20):
        copy, calls = Place.copy, []

        def dies(self, *rest, copy=copy, calls=calls, call=call):
            calls.append(None)
            if len(calls) == call:
                raise Killed
            copy(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Place, "copy", dies)
            try:
                merge(killed.url, [there.url])
                break
            except Killed:
                assert set(killed.statuses()) >= {"b"}
    contents = [
        {path.removeprefix(store.root): text for path, text in store.snapshot().items() if "ledger" not in path}
        for store in (killed, whole)
    ]
    assert contents[0] == contents[1] and killed.statuses() == whole.statuses() and call > 1
    assert not any("older" in path for path in contents[0])


def test_a_run_that_is_under_way_here_is_not_touched(tmp_path):
    here, there = Store(str(tmp_path / "here")), Store(str(tmp_path / "there")).add(row("a")).add(row("b"))
    (tmp_path / "here" / "cells" / "b").mkdir(parents=True)
    with locked(tmp_path / "here" / "cells" / "b" / "lock"), pytest.raises(ValueError, match="run b is under way in"):
        merge(here.url, [there.url])
    assert here.statuses() == {"a": "done"}
    merge(here.url, [there.url])
    assert here.statuses() == {"a": "done", "b": "done"}


def test_a_run_that_was_stopped_elsewhere_goes_on_here(make_run, data, first_steps, killed_at):
    run = make_run("session.checkpoint_seconds=0")
    with killed_at(7):
        execute(run, data)
    there = f"{run.session.root}-there"
    merge(there, [str(run.session.root)])
    moved = make_run(f"session.root={there}")
    assert execute(moved, data)["status"] == "done" and first_steps == [0, 7]
    merge(str(run.session.root), [there])
    assert execute(run, data) == execute(moved, data) and len(ledger.read(run.ledger)) == 1


def test_runs_on_an_object_store_are_refused_with_the_way_there(make_config):
    from experiments.harness.identity import run_of

    with pytest.raises(ValueError, match="session.root='s3://mine/runs' must be a folder: python -m experiments.merge"):
        run_of(make_config("session.root=s3://mine/runs"))


def append_many(arguments):
    path, worker, number = arguments

    def no_flock(*_):
        raise OSError(number, "flock")

    fcntl.flock = no_flock  # in a process of its own
    for i in range(10):
        ledger.append(path, row(f"{worker}-{i}", error="x" * 5000))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_rows_of_many_processes_are_whole_where_the_file_system_has_no_flock(tmp_path, number):
    path = tmp_path / "ledger.jsonl"
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(append_many, [(path, worker, number) for worker in range(3)]))
    assert sorted(ledger.read(path).id) == sorted(f"{worker}-{i}" for worker in range(3) for i in range(10))
    assert not list(tmp_path.glob("*.held")), "held as long as a row takes"


def test_what_is_not_copied_is_what_belongs_to_a_process():
    names = ["lock", "running", "row.json.tmp", "unfinished.ckpt", "lock.held", "ledger.jsonl.lock"]
    assert all(merging.NOT_COPIED.fullmatch(name) for name in names)
    assert not merging.NOT_COPIED.fullmatch(Path("step-000000007-0123456789abcdef.ckpt").name)
