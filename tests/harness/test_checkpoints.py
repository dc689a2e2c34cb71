"""A run goes on from its last checkpoint that holds what was written, wherever a kill or a disk has torn one."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness import checkpoints, hardware
from experiments.harness.checkpoints import generations, last_good
from experiments.harness.run import execute


class Stop(BaseException):
    """A kill in the middle of a run."""


@pytest.fixture
def stopped(make_run, data, killed_at):
    """A run that was killed at its seventh step, with a checkpoint of each before."""
    run = make_run("session.checkpoint_seconds=0")
    with killed_at(7):
        execute(run, data)
    return run


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def test_the_last_two_checkpoints_are_kept_and_none_when_the_run_is_done(stopped, data):
    assert [step for step, _ in generations(stopped.folder)] == [7, 6]
    assert execute(stopped, data)["status"] == "done" and not list(stopped.folder.glob("*.ckpt"))


@pytest.mark.parametrize("tear", [truncate, empty, zero])
@pytest.mark.parametrize(("torn", "begins"), [(1, 6), (2, 0)])
def test_a_torn_checkpoint_is_passed_over_and_the_result_is_the_same(
    stopped, make_run, data, first_steps, caplog, tear, torn, begins
):
    for _, path in generations(stopped.folder)[:torn]:
        tear(path)
    row = execute(stopped, data)
    truth = execute(make_run(f"session.root={stopped.session.root}-whole"), data)
    assert first_steps[0] == begins and row["bits_per_byte"] == truth["bits_per_byte"]
    assert sum("is damaged" in message for message in caplog.messages) == torn


def test_a_run_goes_on_with_the_threads_that_it_was_begun_with(make_run, data, monkeypatch, killed_at):
    run, free, taken = make_run("session.checkpoint_seconds=0"), iter([2, 1]), []
    monkeypatch.setattr(hardware, "best_threads", lambda *_: next(free))
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    with killed_at(7):
        execute(run, data)
    assert execute(run, data)["status"] == "done" and taken == [2, 2]


@pytest.mark.parametrize("where", ["save_checkpoint", "replace", "unlink"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(stopped, make_run, data, monkeypatch, where):
    def killed(*_, **__):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        target = {"save_checkpoint": "lightning.Trainer.save_checkpoint", "replace": "os.replace"}.get(where)
        patch.setattr(target or "pathlib.Path.unlink", killed)
        execute(stopped, data)
    assert last_good(stopped.folder) is not None
    truth = execute(make_run(f"session.root={stopped.session.root}-whole"), data)
    assert execute(stopped, data)["bits_per_byte"] == truth["bits_per_byte"]


@given(drawn=st.data(), whole=st.binary(min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_whatever_happens_to_the_bytes_of_a_checkpoint_what_is_taken_is_what_was_written(
    tmp_path_factory, drawn, whole
):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoints.write(folder, step, lambda path: path.write_bytes(whole))
    (_, last), (_, before) = generations(folder)
    start = drawn.draw(st.integers(0, len(whole)))
    left = whole[:start] + drawn.draw(st.binary(max_size=9)) + whole[drawn.draw(st.integers(start, len(whole))) :]
    last.write_bytes(left)
    assert last_good(folder) == (last if left == whole else before)


def test_of_a_checkpoint_that_is_a_folder_every_shard_counts(tmp_path):
    def shards(folder):
        folder.mkdir()
        for name in ("__0_0.distcp", "__1_0.distcp"):
            (folder / name).write_bytes(name.encode())

    (tmp_path / "unfinished.ckpt").mkdir()
    (tmp_path / "unfinished.ckpt" / "__7_0.distcp").write_bytes(b"of a kill, on more processes")
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, step, shards)
    (_, last), (_, before) = generations(tmp_path)
    assert last_good(tmp_path) == last and len(list(last.iterdir())) == 2
    truncate(last / "__1_0.distcp")
    assert last_good(tmp_path) == before
    (before / "__0_0.distcp").unlink()
    assert last_good(tmp_path) is None
    checkpoints.remove(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_unfinished_file_is_no_checkpoint(tmp_path):
    (tmp_path / "unfinished.ckpt").write_bytes(b"half")
    assert last_good(tmp_path) is None
    checkpoints.remove(tmp_path)
    assert os.listdir(tmp_path) == []
