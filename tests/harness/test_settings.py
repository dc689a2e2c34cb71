"""A setting that no run can have is answered in one sentence, before anything is loaded: its name, its value, what is
allowed."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments import CONFIGS
from experiments.harness.identity import plain, run_of
from experiments.harness.settings import check_run, check_stranger, conform_part
from experiments.harness.weights import load_run

MISTAKES = [
    ("budget.flops=inf", "budget.flops=inf must be finite"),
    ("budget.flops=nan", "budget.flops=nan must be finite"),
    ("budget.flops=lots", "budget.flops='lots' must be a number"),
    ("budget.flops=-1", "budget.flops=-1 must be above 0"),
    ("budget.batch_tokens=0", "budget.batch_tokens=0 must be above 0"),
    ("data.sequence_length=0", "data.sequence_length=0 must be at least 1"),
    ("data.sequence_length=-5", "data.sequence_length=-5 must be at least 1"),
    ("data.packed=maybe", "data.packed='maybe' must be true or false"),
    ("seed=abc", "seed='abc' must be a whole number"),
    ("seed=-1", "seed=-1 must be at least 0"),
    ("arch.width=4.5", "arch.width=4.5 must be a whole number"),
    ("arch.model.pattern=attention", "arch.model.pattern='attention' must be a list, as in [a,b]"),
    ("arch.model.depth=two", "arch.model.depth='two' must be a whole number"),
    ("optim.learning_rate=fast", "optim.learning_rate='fast' must be a number"),
    ("optim.betas=[1]", "optim.betas=[1] has too few entries"),
    ("+optim.learning_rte=1", "optim.learning_rte is no setting of experiments.harness.optimisers.AdamW: did you mean"),
    ("+budget.tokens=1", "budget.tokens is no setting that there is: leave it out"),
    ("session.older=x", "session.older='x' must be one of 'refuse', 'accept' or 'replace'"),
    ("data=text_files", "data.path must be given, as data.path=..."),
    ("optim._target_=nowhere.X", "optim._target_='nowhere.X' is nothing that can be built"),
]


@pytest.mark.parametrize(("override", "words"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(make_config, override, words):
    with pytest.raises(ValueError) as raised:
        run_of(make_config(override))
    assert str(raised.value).startswith(words) and "\n" not in str(raised.value)


GROUPS = ("arch", "objective", "optim", "schedule", "trainer", "adapter")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted(Path(CONFIGS, group).glob("*.yaml"))]


@pytest.mark.thorough
@pytest.mark.parametrize("choice", CHOICES)
def test_every_config_that_is_there_conforms(make_config, choice):
    given = {"objective=distillation": ["objective.models.teacher=another"]}  # what has no default
    check_run(plain(make_config(choice, *given.get(choice, []))))


@pytest.mark.parametrize("size", [8, "8"])
def test_a_part_is_checked_by_the_signature_of_what_it_builds(size):
    part = {"_target_": "archs.channels.mlp.MLP", "_partial_": True, "activation": "silu", "gated": True}
    whole = {"parts": [part | {"multiple_of": size}]}
    if size == 8:
        conform_part(whole, "arch")
        return
    with pytest.raises(ValueError, match=r"arch.parts.multiple_of='8' must be a whole number"):
        conform_part(whole, "arch")


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING |= st.lists(ANYTHING, max_size=2) | st.dictionaries(st.text("ab", min_size=1), ANYTHING, max_size=2)


def paths(node, path=""):
    for name, value in node.items():
        below = f"{path}.{name}" if path else name
        yield below
        if isinstance(value, dict):
            yield from paths(value, below)


@pytest.mark.thorough
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), value=ANYTHING | st.just("\n"))
def test_any_value_of_any_setting_conforms_or_is_answered_in_a_sentence(make_config, drawn, value):
    config = plain(make_config("arch=gated_delta_hybrid", "objective=masked_diffusion"))
    path = drawn.draw(st.sampled_from(sorted(paths(config))))
    *above, last = path.split(".")
    node = config
    for name in above:
        node = node[name]
    node[last] = value
    try:
        check_run(config)
    except ValueError as error:
        assert str(error).startswith(path) and "\n" not in str(error).replace(repr(value), "")
    else:
        assert OmegaConf.create({"kept": path})


def test_a_config_of_this_project_may_be_somebody_elses(make_config):
    check_stranger(plain(make_config("arch=qwen3_next", "objective=block_diffusion", "data=hidden_markov")))


@pytest.mark.parametrize(
    "target",
    [
        "pandas.read_pickle",
        "joblib.load",
        "numpy.load",
        "torch.load",
        "builtins.eval",
        "experiments.harness.files.write_atomically",
        "experiments.findings.write_json",
        "experiments.data.corpora.json.loads",
        "archs.mixers.attention.nn.Linear",
        "archs.nothing",
        7,
    ],
)
def test_a_config_of_somebody_else_builds_nothing_but_parts_of_this_project(make_config, target):
    config = plain(make_config())
    config["optim"]["deeper"] = [{"_target_": target, "path": "x"}]
    with pytest.raises(ValueError, match=r"optim.deeper.0._target_=.* is no part of this project"):
        check_stranger(config)
    if isinstance(target, str):
        check_stranger(config, [target.partition(".")[0]])


def test_a_config_of_somebody_else_chooses_no_place_to_write_to(make_config):
    config = plain(make_config("data=python_stdlib", "+data.tokens.cache_dir=/tmp/x"))
    with pytest.raises(ValueError, match="data.tokens.cache_dir='/tmp/x' is a place to write to"):
        check_stranger(config)


def test_a_run_of_somebody_else_is_read_before_anything_of_it_is_built(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("data: {tokens: {_target_: os.mkdir, path: here}}\n")
    with pytest.raises(ValueError, match="data.tokens._target_='os.mkdir' is no part of this project"):
        load_run(tmp_path)
