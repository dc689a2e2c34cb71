"""A run that goes wrong says so in a line, keeps the rest in a file, and is tried again."""

import pytest
import torch
from torch._inductor.exc import InductorError

from experiments.harness import hardware, ledger, training
from experiments.harness.failures import first_telling_line
from experiments.harness.run import execute
from experiments.harness.telemetry import Telemetry

OUTPUT = "CppCompileError: C++ compile error\n" + "error: line of a compiler's output\n" * 3000


def fail_in_a_step(monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(Telemetry, "on_train_batch_start", broken)


def test_a_crash_is_a_short_row_beside_the_whole_traceback_and_is_tried_again(make_run, data, monkeypatch):
    run = make_run()
    with monkeypatch.context() as patch:
        fail_in_a_step(patch, RuntimeError(f"backend='inductor' raised:\n{OUTPUT}"))
        row = execute(run, data)
    said = f"RuntimeError: CppCompileError: C++ compile error (all of it in cells/{run.id}/failure.log)"
    assert row["status"] == "failed" and row["error"] == said
    log = (run.session.root / said.rpartition("all of it in ")[2].rstrip(")")).read_text()
    assert OUTPUT in log and "on_train_batch_start" in log
    assert execute(run, data)["status"] == "done" and not (run.folder / "failure.log").exists()
    assert ledger.read(run.ledger).status.tolist() == ["done"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("a"), "a"),
        (RuntimeError("\n heading:\n\n  reason \nrest"), "reason"),
        (RuntimeError("only a heading:"), "only a heading:"),
        (MemoryError(), ""),
    ],
)
def test_the_line_of_an_error_that_tells_something_is_taken(error, line):
    assert first_telling_line(error) == line


def test_a_long_line_is_cut(make_run, data, monkeypatch):
    fail_in_a_step(monkeypatch, RuntimeError("/a/long/path" * 500))
    assert len(execute(make_run(), data)["error"]) < 360


def without_a_compiler(run, data, prepared, row, original=training._train):
    if prepared.compiled:
        raise InductorError(RuntimeError("No working C++ compiler found"), None)
    return original(run, data, prepared, row)


def test_where_compiling_fails_a_run_is_trained_uncompiled_and_says_so_once(make_run, data, monkeypatch):
    monkeypatch.setattr(hardware, "compiling_pays", lambda *_: True)
    monkeypatch.setattr(training, "_train", without_a_compiler)
    with pytest.warns(UserWarning, match="trained uncompiled, since compiling fails.*No working C\\+\\+ compiler"):
        row = execute(make_run(), data)
    assert row["status"] == "done" and row["compiled"] is False
    assert row["bits_per_byte"] == execute(make_run("trainer.compile=false"), data)["bits_per_byte"]


def test_compilation_that_was_asked_for_and_fails_is_a_failed_run(make_run, data, monkeypatch):
    monkeypatch.setattr(training, "_train", without_a_compiler)
    row = execute(make_run("trainer.compile=true"), data)
    assert row["status"] == "failed"
    assert row["error"].startswith("RuntimeError: trainer.compile=true fails on this machine, take false or auto: ")


@pytest.mark.thorough
def test_a_machine_without_a_compiler_trains(make_run, data, monkeypatch):
    monkeypatch.setattr(hardware, "compiling_pays", lambda *_: True)
    changes = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    with torch._inductor.config.patch(changes), pytest.warns(UserWarning, match="No working C\\+\\+ compiler"):
        row = execute(make_run(), data)
    assert row["status"] == "done" and row["compiled"] is False
