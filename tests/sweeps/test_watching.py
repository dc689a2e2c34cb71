"""The page to watch a sweep by says what is running, done, failed and left, and never passes for newer than it is."""

import re
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest
from omegaconf import OmegaConf

from experiments.findings import write_json
from experiments.harness import ledger
from experiments.harness.files import locked
from experiments.sweeps import watching
from experiments.sweeps.watching import finished, look, watch
from tests.sweeps.untrained import Untrained


class Folder:
    """A sweep's folder in which so many of its cells have ended, two of them badly."""

    def __init__(self, path):
        self.path, self.sweep = path, Untrained(failing=lambda cell: cell.budget == 3e10 and cell.width < 30)
        write_json(path / "plan.json", self.sweep.plan)
        self.stack, self.cells = ExitStack(), self.sweep.plan.cells

    def end(self, cells):
        self.sweep.run(cells)
        known = ledger.read(self.path / "ledger.jsonl").id.tolist()
        for row in self.sweep.rows.astype(object).mask(self.sweep.rows.isna(), None).to_dict("records"):
            if row["id"] not in known:
                row["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
                ledger.append(self.path / "ledger.jsonl", row | {"versions": {}, "device": "none"})
        return self

    def start(self, name, alive=True):
        folder = self.path / "cells" / name
        folder.mkdir(parents=True)
        (folder / "running").touch()
        parts = {"session": {"arm": "arm0", "kind": "fit"}, "budget": {"flops": 6e10}, "arch": {"width": 24}}
        OmegaConf.save(OmegaConf.create(parts), folder / "cell.yaml")
        if alive:
            self.stack.enter_context(locked(folder / "lock"))
        return self


@pytest.fixture
def folder(tmp_path):
    found = Folder(tmp_path / "sweep")  # the report scores the sweeps beside it too, which are not those of other tests
    with found.stack:
        yield found


def page(folder):
    return (folder.path / "watch.html").read_text()


def test_the_page_counts_what_is_done_running_failed_and_left_above_the_report(folder):
    cells = [cell for cell in folder.cells if cell.kind == "fit"]
    folder.end(cells[:20]).start("a1").start("b2").start("killed", alive=False)
    pages = watch(folder.path, 5)
    state = next(pages)
    failed = int((folder.sweep.rows.status == "failed").sum())
    assert failed > 0 and (state.done, state.failed) == (20 - failed, failed)
    assert [run.id for run in state.running] == ["a1", "b2"], "nobody holds the lock of the one that was killed"
    assert state.left == len(folder.cells) - 20 + failed - 2
    text = page(folder)
    for number, words in ((2, "running"), (20 - failed, "done"), (failed, "failed"), (state.left, "left of")):
        assert re.search(rf"<b>{number}</b> {words}", text)
    assert 'http-equiv="refresh" content="5"' in text and "cells/a1/" in text and "arm0" in text
    assert text.index('class="watch"') < text.index("<h1>untrained</h1>") and text.count("<!doctype html>") == 1


def test_the_time_left_is_what_the_cells_that_are_left_will_take_as_many_at_once_as_now(folder):
    cells = [cell for cell in folder.cells if cell.budget != 3e10 or cell.width >= 30]
    assert look(folder.path, 1).seconds is None, "nothing tells it"
    folder.end(cells[: len(cells) // 2])
    assert look(folder.path, 1).seconds is None, "nothing is running"
    folder.start("a1")
    left = sum(cell.flops for cell in folder.cells) - folder.sweep.rows.flops.sum()
    assert look(folder.path, 1).seconds == pytest.approx(1e-10 * left, rel=0.05)
    folder.start("b2")
    assert look(folder.path, 1).seconds == pytest.approx(1e-10 * left / 2, rel=0.05)


def test_a_watch_that_is_stopped_says_that_its_page_is_not_made_again(folder):
    pages = watch(folder.end(folder.cells[:3]).path, 5)
    next(pages)
    assert "not made again" not in page(folder)
    pages.close()
    assert "not made again" in page(folder) and "http-equiv" not in page(folder)


def test_the_page_leads_to_the_report_when_the_sweep_has_ended_and_not_before(folder):
    folder.end(folder.cells[:3])
    (folder.path / "report.html").write_text("the report")
    assert finished(folder.path, look(folder.path, 1))
    folder.end(folder.cells[:4])
    assert not finished(folder.path, look(folder.path, 1)), "a report of before the last run is an older one"
    (folder.path / "report.html").write_text("the report")
    assert list(watch(folder.path, 1)) == [] and "url=report.html" in page(folder)


def test_the_report_is_made_again_only_when_a_run_has_ended(folder, monkeypatch):
    made, original = [], watching.report_so_far
    monkeypatch.setattr(watching, "report_so_far", lambda path: made.append(path) or original(path))
    monkeypatch.setattr(watching, "SHARE", 1e9)
    pages = watch(folder.end(folder.cells[:3]).path, 0.01)
    assert [next(pages).done for _ in range(3)] == [next(pages).done] * 3 and len(made) == 1
    folder.end(folder.cells[:6])
    next(pages)
    assert len(made) == 2


def test_a_watch_waits_for_a_sweep_that_has_not_begun(tmp_path):
    pages = watch(tmp_path / "sweep", 0.01)
    assert next(pages) is None and next(pages) is None
    folder = Folder(tmp_path / "sweep")
    assert next(pages).planned == len(folder.cells)
