"""A result is what the present code makes of the present data; one of other code or data is never used in silence."""

import json
from dataclasses import replace

import pytest

from experiments.harness import identity, ledger, origin, training
from experiments.harness.run import execute

MIXER = '"""A mixer."""\nfrom {package}.parts import factor\n\n\ndef mix(x):\n    """Mix."""\n    return factor * x\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of somebody's own package on the path, with a module for a config to name and one that this needs."""
    folder = tmp_path / f"theirs_{tmp_path.name}"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mixer.py").write_text(MIXER.format(package=folder.name))
    (folder / "parts.py").write_text("factor = 2\n")
    (folder / "unused.py").write_text("factor = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def digest(package):
    return origin.code_digest({"model": [{"_target_": f"{package.name}.mixer.mix"}]})


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("mixer.py", "return factor * x", "return factor * x + 1", True),
        ("mixer.py", '    """Mix."""\n', '    """Mix anew."""\n    # Why.\n\n', False),
        ("mixer.py", '"""A mixer."""\n', "", False),
        ("parts.py", "2", "4", True),
        ("unused.py", "3", "5", False),
    ],
)
def test_the_digest_of_the_code_is_that_of_what_can_change_a_result(package, file, old, new, changes):
    before = digest(package)
    (package / file).write_text((package / file).read_text().replace(old, new))
    assert (digest(package) != before) == changes


def test_a_backbone_depends_on_its_own_mixers_and_not_on_others(make_config):
    def files(*overrides):
        seen = []
        original = origin._parsed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(origin, "_parsed", lambda name, *rest: (seen.append(name), original(name, *rest))[1])
            origin.code_digest(identity.plain(make_config(*overrides)))
        return set(seen)

    plain, hybrid = files("arch=transformer"), files("arch=gated_delta_hybrid")
    shared = {"archs.language_model", "archs.mixers.attention", "objectives.next_token", "experiments.harness.trainer"}
    assert shared <= plain and "archs.mixers.gated_delta" in hybrid - plain
    assert "archs.mixers.mamba2" not in plain | hybrid and "experiments.harness.ledger" not in plain


def test_names_that_are_no_modules_of_the_project_are_passed_over():
    assert origin.code_digest({"_target_": "nowhere.at.all"}) == origin.code_digest({"_target_": "torch.nn.Linear"})


@pytest.fixture
def other_code(monkeypatch):
    monkeypatch.setattr(identity, "code_digest", lambda config: "0" * 12)


def test_a_result_of_other_code_is_refused_in_a_sentence(make_run, data, other_code, monkeypatch):
    execute(make_run(), data)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was made by other code \(digest 0{12}.*session.older=accept takes it"):
        execute(make_run(), data)


def test_a_result_of_other_data_is_refused_in_a_sentence(make_run, data):
    execute(make_run(), data)
    with pytest.raises(ValueError, match=r"was made by other data \(digest 0{12}; now 1{12}\)"):
        execute(make_run(), replace(data, digest="1" * 64))


def test_a_result_of_other_code_is_taken_as_it_is_where_that_is_asked_for(make_run, data, other_code, monkeypatch):
    first = execute(make_run(), data)
    monkeypatch.undo()
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    assert execute(make_run("session.older=accept"), data)["finished"] == first["finished"]


def test_a_result_of_other_code_is_put_aside_and_made_again_where_that_is_asked_for(
    make_run, data, other_code, monkeypatch
):
    first = execute(make_run(), data)
    monkeypatch.undo()
    run = make_run("session.older=replace")
    again = execute(run, data)
    assert again["code"] == run.code != first["code"]
    assert ledger.read(run.ledger).code.tolist() == [run.code]
    aside = run.folder.with_name(f"{run.id}.older-1")
    assert json.loads((aside / "row.json").read_text())["code"] == first["code"]
    assert execute(make_run(), data)["code"] == run.code, "what replaced it is found again"


@pytest.mark.parametrize("stopped", ["from the beginning", "while it replaced another"])
def test_a_run_does_not_go_on_from_a_checkpoint_of_other_code(make_run, data, monkeypatch, killed_at, stopped):
    settings = ["session.checkpoint_seconds=0"]
    if stopped == "while it replaced another":
        with monkeypatch.context() as patch:
            patch.setattr(identity, "code_digest", lambda config: "1" * 12)
            execute(make_run(), data)
        settings.append("session.older=replace")
    with killed_at(5), monkeypatch.context() as patch:
        patch.setattr(identity, "code_digest", lambda config: "0" * 12)
        execute(make_run(*settings), data)
    with pytest.raises(ValueError, match="was begun by other code"):
        execute(make_run(), data)
    accepted = execute(make_run("session.older=accept"), data)
    assert accepted["code"] == "0" * 12, "the row says by what code it was begun"


def test_a_run_that_crashed_is_tried_again_by_the_code_that_mends_it(make_run, data, monkeypatch):
    def broken(*_):
        raise RuntimeError("a mistake in the code")

    with monkeypatch.context() as patch:
        patch.setattr(identity, "code_digest", lambda config: "0" * 12)
        patch.setattr(training, "_train", broken)
        assert execute(make_run(), data)["status"] == "failed"
    row = execute(make_run(), data)
    assert row["status"] == "done" and row["code"] == make_run().code


def test_a_row_whose_result_is_no_number_is_no_result(make_run, data):
    run = make_run()
    row = execute(run, data)
    (run.folder / "row.json").unlink()
    run.ledger.write_text(json.dumps(row | {"bits_per_byte": float("nan")}) + "\n")
    assert execute(run, data)["bits_per_byte"] == row["bits_per_byte"]
