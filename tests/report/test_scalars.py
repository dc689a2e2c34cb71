"""TensorBoard shows a sweep as one view: bits per byte against FLOPs, named by arm and size."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.report import scalars
from tests.report import planted


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["scalars"] == [scalars.TAG]
    return {event.step: event.value for event in events.Scalars(scalars.TAG)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("scalars") / "tensorboard", planted.rows()
    scalars.write(folder, rows)
    scalars.write(folder, rows)
    return folder, rows


def test_a_curve_is_named_by_arm_and_size_and_its_steps_are_flops(written):
    folder, rows = written
    run = rows[(rows.arm == planted.HYBRID) & (rows.budget_flops == 6e10)].iloc[0]
    got = read(folder / f"{planted.HYBRID}, 4.71k parameters")
    assert got == {60_000: pytest.approx(run.bits_per_byte)}


def test_each_arm_has_a_curve_of_its_lowest_runs(written):
    folder, rows = written
    got = read(folder / f"{planted.REFERENCE}, lowest")
    runs = rows[(rows.arm == planted.REFERENCE) & (rows.kind != "tune")]
    lowest = runs.groupby("budget_flops").bits_per_byte.min()
    assert list(got) == [30_000, 60_000, 120_000, 240_000, 960_000] and list(got.values()) == pytest.approx(
        list(lowest)
    )


def test_writing_twice_leaves_one_file_in_each_folder(written):
    assert {len(list(folder.iterdir())) for folder in written[0].iterdir()} == {1}


def test_a_name_with_slashes_stays_in_the_folder(tmp_path):
    rows = planted.rows().assign(arm="../../up")
    scalars.write(tmp_path / "tensorboard", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert (tmp_path / "tensorboard" / ".._.._up, lowest").is_dir()
