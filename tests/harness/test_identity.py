"""A run's identity is its config but for `session`: a change of anything else makes another run."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from safetensors.torch import save_file

from archs.language_model import LanguageModel
from experiments.harness.identity import SESSION, SPREAD, find_weights, run_of
from experiments.harness.parts import build_model, build_objective
from experiments.harness.run import execute
from experiments.harness.weights import begin_from, load_run


def leaves(config, path=""):
    """Path and value of everything in a config."""
    for key, value in OmegaConf.to_container(config, resolve=True).items() if not path else config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.mark.thorough
def test_every_value_outside_the_session_is_part_of_the_identity_and_none_inside(make_config, monkeypatch):
    for check in ("check_settings", "check_parts"):  # any value will do
        monkeypatch.setattr(f"experiments.harness.identity.{check}", lambda config: None)
    config = make_config("arch=qwen3_next", "objective=masked_diffusion")
    before, inside, outside = run_of(config).id, 0, 0
    for path, value in list(leaves(config)):
        if path == "init_from" or value is None:
            continue
        changed = config.copy()
        other = (not value) if isinstance(value, bool) else value * 2 + 1 if isinstance(value, int | float) else "other"
        OmegaConf.update(changed, path, [other] if isinstance(value, list) else other, force_add=True)
        if path.startswith(f"{SESSION}.") or path.removeprefix("trainer.") in SPREAD:
            inside += 1
            assert run_of(changed).id == before, path
        else:
            outside += 1
            assert run_of(changed).id != before, path
    assert inside >= 5 and outside > 60


def test_how_a_run_is_spread_is_kept_beside_an_identity_in_which_one_device_stands(make_run):
    spread = {"devices": 4, "nodes": 2, "strategy": "fsdp", "experts": 2, "microbatch": 3, "recompute": True}
    run = make_run(*(f"trainer.{name}={value}" for name, value in spread.items()))
    assert run.spread == spread and run.id == make_run().id
    assert {name: run.config.trainer.get(name) for name in SPREAD} == SPREAD


@pytest.mark.thorough
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.text("abcdefghij_", min_size=1).filter(lambda name: name != SESSION),
    content=st.dictionaries(st.text("xyz", min_size=1), st.integers() | st.text("uvw") | st.booleans(), min_size=1),
)
def test_a_group_that_somebody_adds_joins_the_identity_by_itself(make_config, group, content):
    config = make_config()
    before = run_of(config).id
    with open_dict(config):
        config[group] = content
    assert run_of(config).id != before
    assert run_of(config).id == run_of(config.copy()).id


@pytest.mark.thorough
def test_the_config_in_a_runs_folder_is_its_identity_and_nothing_more(make_run, data):
    run = make_run()
    execute(run, data)
    saved = OmegaConf.load(run.folder / "config.yaml")
    assert saved == run.config and SESSION not in saved


def test_no_two_runs_share_a_folder_and_a_label_moves_none(make_run):
    assert make_run().folder != make_run("seed=1").folder
    assert make_run("session.arm=x", "session.kind=fit").folder == make_run().folder
    assert make_run("session.arm=x").session.arm == "x" and make_run().session.arm == "transformer+next_token"


def run_on(make_run, data, *overrides):
    run = make_run(*overrides)
    row = execute(run, data)
    assert row["status"] == "done", row["error"]
    return run, row


@pytest.mark.thorough
def test_a_run_goes_on_from_the_weights_of_another(make_run, data):
    first, _ = run_on(make_run, data, "budget.flops=2e9")
    fresh, row = run_on(make_run, data, "seed=5")
    going_on, more = run_on(make_run, data, "seed=5", f"init_from={first.id}")
    assert more["init_from"] == f"{first.id}-{first.code}" and going_on.id != fresh.id
    assert more["bits_per_byte"] < row["bits_per_byte"] - 0.02
    by_folder = make_run("seed=5", f"init_from={first.folder}")
    assert by_folder.id == going_on.id  # the weights count, not how they were named


@pytest.mark.thorough
def test_weights_without_a_run_are_known_by_their_content(make_run, data, tmp_path):
    first, _ = run_on(make_run, data)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes((first.folder / "model.safetensors").read_bytes())
    a, b = (make_run(f"init_from={tmp_path / name}") for name in ("a", "b"))
    assert a.id == b.id and a.config.init_from.startswith("sha256:")
    tensors = {"embedding.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "b" / "weights.safetensors")
    assert make_run(f"init_from={tmp_path / 'b'}").id != a.id


@pytest.mark.thorough
@pytest.mark.parametrize("before", ["next_token", "masked_diffusion", "multi_token", "uniform_diffusion"])
@pytest.mark.parametrize("after", ["next_token", "masked_diffusion", "multi_token", "uniform_diffusion"])
def test_another_objective_takes_what_both_have_and_begins_the_rest_anew(make_run, data, monkeypatch, before, after):
    first, _ = run_on(make_run, data, f"objective={before}", "budget.flops=2e7")
    source = load_run(first.folder, data).model
    run = make_run(f"objective={after}", f"init_from={first.id}", "budget.flops=2e7")
    taken: dict[str, torch.Tensor] = {}

    def watch(model: LanguageModel, folder):
        begin_from(model, folder)
        taken.update({name: p.detach().clone() for name, p in model.named_parameters()})

    monkeypatch.setattr("experiments.harness.training.begin_from", watch)
    assert execute(run, data)["status"] == "done"
    for name, theirs in source.named_parameters():
        if name in taken:
            rows = min(len(theirs), len(taken[name]))
            assert torch.equal(taken[name][:rows], theirs[:rows]), name
        else:
            assert name.startswith(("time.", "ahead."))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("init_from=123456789abc", "neither .*cells/123456789abc nor a folder of that name holds"),
        ("init_from={first}", None),
    ],
)
def test_weights_that_are_not_there_or_of_another_model_are_refused(make_run, make_config, data, override, words):
    if words is not None:
        with pytest.raises(ValueError, match=words):
            make_run(override)
        return
    first, _ = run_on(make_run, data)
    wider = make_run("arch.width=32", override.format(first=first.id))
    row = execute(wider, data)
    assert row["status"] == "failed"
    assert "of another model: embedding.weight is [17, 16] there and [17, 32] here" in row["error"]


def test_a_row_beside_the_weights_says_whose_they_are(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "row.json").write_text(json.dumps({"id": "abc"}))
    assert find_weights("init_from", str(tmp_path), tmp_path) == (tmp_path, "abc")


def test_every_tensor_that_does_not_fit_is_found(make_run, data, tmp_path):
    run = make_run()
    model = build_model(run.config, run_objective(run, data))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name in ("norm.weight", "blocks.0.mixer.qkv.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} is absent there"):
            begin_from(model, tmp_path)
    save_file(tensors | {"stranger": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"stranger is \[3\] there and absent here"):
        begin_from(model, tmp_path)


def run_objective(run, data):
    return build_objective(run.config, data)
