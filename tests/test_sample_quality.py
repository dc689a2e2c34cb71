"""The measures of samples, and the experiment end to end at a size that takes seconds."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import sample_quality
from experiments.data.hidden_markov import HiddenMarkovLanguage
from tests.conftest import CONFIGS

LANGUAGE = HiddenMarkovLanguage(states=4, symbols=5, concentration=0.3, seed=0)


def test_true_sequences_have_the_entropy_and_the_pairs_of_the_language():
    got = sample_quality.judge(LANGUAGE, LANGUAGE.sample(4000, 16, torch.Generator().manual_seed(0)))
    entropy, error = LANGUAGE.entropy_per_token(16, 4000, torch.Generator().manual_seed(1))
    assert abs(got["nats"] - entropy) < 4 * math.hypot(got["nats_se"], error)
    assert got["pair_distance"] < 0.02 and got["impossible"] == 0


def test_dull_samples_are_likely_and_their_pairs_give_them_away():
    true = LANGUAGE.sample(500, 16, torch.Generator().manual_seed(0))
    dull = true[(-LANGUAGE.log_likelihood(true)).argmin()].expand(500, -1)
    got, expected = (sample_quality.judge(LANGUAGE, x) for x in (dull, true))
    assert got["nats"] < expected["nats"] and got["pair_entropy"] < expected["pair_entropy"]
    assert got["pair_distance"] > expected["pair_distance"] + 0.2


def test_sequences_with_an_id_that_is_no_symbol_are_counted_and_left_out():
    tokens = LANGUAGE.sample(10, 16, torch.Generator().manual_seed(0))
    tokens[3, 5] = LANGUAGE.symbols
    assert sample_quality.judge(LANGUAGE, tokens)["impossible"] == pytest.approx(0.1)


def test_every_sampler_has_a_row_for_the_trained_model_and_for_the_language_itself(tmp_path):
    small = [f"root={tmp_path}", "budget.flops=1e9", "arch.width=16", "data.sequence_length=16", "jobs=1"]
    small += ["quality.samples=24", "quality.batch=16", "optim.batch_tokens=1024", "data.tokens.train_tokens=65536"]
    small += ["data.tokens.language={states:4,symbols:5,concentration:0.3,seed:0}", "data.tokens.heldout_tokens=1024"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("sample_quality", small)
        for curve in config.quality.curves.values():
            if "at" in curve:
                curve.at = curve.at[:2]
        table = sample_quality.table_of(config, small)
    points = 1 + 7 * 2
    assert len(table) == 1 + 2 * points
    trained = table[table.model == "trained"]
    assert set(trained.curve) == set(config.quality.curves)
    assert (trained.flops > 0).all() and (trained.evaluations >= 1).all() and (table.nats > 0).all()
    assert len(sample_quality.figure(table).axes) == 9
    assert len(sample_quality.where_it_pays(table)) == 2 * 7
    ancestral = table[(table.curve == "ancestral") & (table.model == "optimal")]
    assert ancestral.evaluations.tolist()[0] == 1
