"""The ledger keeps every row it was given, whatever happens while it is written."""

import errno
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness import ledger


def row(name, **values):
    return {column: None for column in ledger.COLUMNS} | {"id": name, "status": "done"} | values


def append_many(args):
    path, worker = args
    for i in range(20):
        ledger.append(path, row(f"{worker}-{i}", error="x" * 5000))


def test_rows_of_many_processes_are_all_there_and_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(append_many, [(path, worker) for worker in range(4)]))
    assert sorted(ledger.read(path).id) == sorted(f"{worker}-{i}" for worker in range(4) for i in range(20))


def test_pandas_reads_it_without_our_code(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for i in range(3):
        ledger.append(path, row(str(i), bits_per_byte=2.5 + i, versions={"torch": "2"}))
    table = pd.read_json(path, lines=True)
    assert list(table.columns) == ledger.COLUMNS and table.bits_per_byte.tolist() == [2.5, 3.5, 4.5]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 2000), rows=st.integers(1, 4))
def test_a_row_cut_short_anywhere_costs_only_itself(tmp_path_factory, cut, rows):
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    for i in range(rows):
        ledger.append(path, row(f"old{i}"))
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: len(whole) - min(cut, last - 1)])
    ledger.append(path, row("new"))
    found = list(_quietly(path).id)
    assert found[-1] == "new" and found[: rows - 1] == [f"old{i}" for i in range(rows - 1)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([b"{}", b"[1]", b"null", b'{"id": [], "status": 1}']), max_size=4)
)
def test_any_bytes_are_read_as_no_rows_and_the_next_row_is_kept(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "ledger.jsonl"
    path.write_bytes(b"\n".join(lines))
    ledger.append(path, row("new"))
    assert list(_quietly(path).id) == ["new"]


def _quietly(path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ledger.read(path)


@pytest.mark.parametrize("bad", ["{not json", "[]", "3", "{}", '{"id": "x"}'])
def test_a_corrupt_row_is_named_with_its_line_skipped_and_kept(tmp_path, bad):
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row("a"))
    with open(path, "a") as file:
        file.write(bad + "\n")
    ledger.append(path, row("b"))
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"line 2: not a ledger row, skipped") as warned:
        assert ledger.read(path).id.tolist() == ledger.read(path).id.tolist() == ["a", "b"]
    assert len(warned) == 1, "a sweep reads its ledger again and again"
    assert path.read_bytes() == before


def test_the_last_row_of_an_id_is_the_one_that_counts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row("a", status="failed"))
    ledger.append(path, row("a"))
    assert ledger.read(path).status.tolist() == ["done"]
    assert len(path.read_text().splitlines()) == 2


def test_a_full_disk_leaves_the_ledger_as_it_was_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row("a"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full.*start again.*ledger.jsonl"):
        ledger.append(path, row("b"))
    assert path.read_bytes() == before


def test_a_number_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError):
        ledger.append(tmp_path / "ledger.jsonl", row("a", bits_per_byte=float("nan")))
    assert ledger.read(tmp_path / "ledger.jsonl").empty


def test_a_missing_ledger_is_an_empty_table(tmp_path):
    assert list(ledger.read(Path(tmp_path) / "none.jsonl").columns) == ledger.COLUMNS
