"""A run that begins with a public checkpoint: its weights, and only where the arch is what its config.json says."""

import re

import pytest
import torch

from archs.checkpoints import read, write
from experiments.harness.identity import run_of
from experiments.harness.parts import build_model, build_objective
from experiments.harness.run import execute
from experiments.harness.weights import begin_from

PADDED = 18  # ids of the checkpoint; the data has 16 symbols and eot
SETTINGS = [
    "arch=llama3", "arch.model.depth=1", "arch.model.mixers.attention.head_dim=8",
    "+arch.model.norm={_target_:torch.nn.RMSNorm,_partial_:true,eps:1e-6}",
]  # fmt: skip
CONFIG = dict(
    model_type="llama", vocab_size=PADDED, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=48, rms_norm_eps=1e-6,
    rope_theta=500000.0,
)  # fmt: skip


@pytest.fixture
def folder(make_config, tmp_path):
    config = run_of(make_config(*SETTINGS)).config
    torch.manual_seed(7)
    model = build_model(config, Vocabulary())
    torch.nn.init.normal_(model.head.weight, std=0.02)
    write(model, tmp_path / "public", CONFIG)
    return tmp_path / "public"


class Vocabulary:
    """What the build of a model asks of an objective."""

    model_vocab_size = PADDED
    model_options: dict = {}


@pytest.mark.parametrize("objective", ["next_token", "masked_diffusion"])
def test_a_run_begins_with_the_weights_of_a_public_checkpoint(make_run, data, folder, objective):
    run = make_run(*SETTINGS, f"objective={objective}", f"init_from={folder}")
    model, public = build_model(run.config, build_objective(run.config, data)), read(folder)
    begin_from(model, folder)
    for name, theirs in public.named_parameters():
        ours = model.get_parameter(name)
        assert torch.equal(ours, theirs[: len(ours)]), name
    assert run.config.init_from.startswith("sha256:") and execute(run, data)["status"] == "done"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arch.model.mixers.attention.position.base=10000", "position is Rotary"),
        ("arch.model.norm.eps=1e-5", "eps is 1e-06, and the model's is 1e-05"),
        ("arch.model.depth=2", "blocks.1.* is absent there"),
        ("+arch.model.mixers.attention.qk_norm=head", "q_norm.* is absent there"),
    ],
)
def test_an_arch_that_is_not_what_its_config_says_is_refused(make_run, data, folder, override, words):
    row = execute(make_run(*SETTINGS, override, f"init_from={folder}"), data)
    assert row["status"] == "failed"
    assert re.search(words, row["error"])


def test_a_table_of_another_tokenizer_is_refused(make_run, data, folder):
    run = make_run(*SETTINGS)
    model = build_model(run.config, type("Small", (Vocabulary,), {"model_vocab_size": 12})())
    with pytest.raises(ValueError, match=r"embedding.weight is \[18, 16\] there and \[12, 16\] here"):
        begin_from(model, folder)
