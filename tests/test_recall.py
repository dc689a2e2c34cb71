"""The recall experiment, end to end at a size that takes seconds."""

import pytest
from hydra import compose, initialize_config_dir

from experiments import recall
from tests.conftest import CONFIGS

TINY = ["recall.steps=150", "recall.learning_rates=[0.01]", "optim.batch_tokens=1024", "arch.width=32", "jobs=1"]
TINY += ["data.tokens.vocab_size=16", "data.tokens.pairs=[1,2]", "data.tokens.train_sequences=5000"]
TINY += ["data.tokens.heldout_sequences=100", "data.sequence_length=16"]


@pytest.fixture
def config(tmp_path):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("recall", [*TINY, f"root={tmp_path}"])
    config.recall.curves = {
        "attention": {"pattern": ["conv", "attention"], "dial": "model.mixers.attention.head_dim", "at": [8, 32]},
        "blind": {"pattern": ["conv"], "dial": "model.mixers.conv.conv_width", "at": [2]},
    }
    return config


def test_attention_recalls_more_than_a_model_that_sees_two_tokens_and_a_second_start_trains_nothing(config):
    table = recall.table_of(config)
    assert table.arch.tolist() == ["attention", "attention", "blind"]
    assert (table.status == "done").all() and table.state_bytes.nunique() == 3
    shares = table.set_index(["arch", "state_bytes"])["accuracy@1"]
    assert shares["attention"].max() > shares["blind"].max() + 0.1
    again = recall.table_of(config)
    assert again.equals(table)
    panels = recall.figure(table).axes
    assert [panel.get_title() for panel in panels] == ["1 pairs", "2 pairs"]
    assert len(panels[0].lines[0].get_xdata()) == 2


def test_the_best_learning_rate_of_each_point_counts(config):
    config.recall.learning_rates, config.recall.steps = [1e-6, 1e-2], 60
    config.recall.curves = {"attention": config.recall.curves.attention}
    shown = recall.best(recall.table_of(config))
    assert shown.learning_rate.tolist() == [0.01, 0.01]


def test_a_curve_with_an_unknown_mixer_is_refused(config):
    config.recall.curves.blind.pattern = ["convolution"]
    with pytest.raises(ValueError, match="curve 'blind' has a mixer 'convolution': choose from attention, conv"):
        recall.table_of(config)
