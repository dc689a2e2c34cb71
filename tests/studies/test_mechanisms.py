"""Mechanisms: whether two models that add right do so in the same way."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.studies.mechanisms import Mechanisms, distance_irrelevance, right_logits

STUDY = Mechanisms("c", "s", "r", {"a": [], "b": [], "other": []}, ["a", "b"], [0, 1, 2], margin=0.1)
P = 11


def table(a, b, heldout=1.0, scatter=0.01):
    return pd.DataFrame([
        {"architecture": name, "seed": seed, "status": "done", "heldout": heldout if name == "a" else 1.0,
         "irrelevance": value + scatter * (seed - 1) * (name == "a")}
        for name, value in (("a", a), ("b", b), ("other", 0.5)) for seed in range(3)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "scatter", "outcome"),
    [(0.9, 0.3, 0.01, "holds"), (0.9, 0.85, 0.01, "does not hold"), (0.9, 0.7, 0.2, "cannot tell")],
)
def test_the_first_must_heed_the_distance_less(a, b, scatter, outcome):
    verdict = STUDY.verdict(table(a, b, scatter=scatter))
    assert verdict.outcome == outcome and verdict.effect.value == pytest.approx(a - b)
    assert "other 0.50 (0.50 to 0.50, 3 of 3 runs)" in verdict.sentence


def test_models_that_do_not_add_right_are_not_compared():
    verdict = STUDY.verdict(table(0.9, 0.3, heldout=0.98))
    assert verdict.outcome == "cannot tell" and verdict.sentence.startswith("0 seeds")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="study compares 'b': choose from a"):
        Mechanisms("c", "s", "r", {"a": []}, ["a", "b"], [0], 0.1).cells(lambda words: None)


def test_irrelevance_is_0_where_logits_follow_from_the_distance_and_1_where_they_follow_from_the_sum():
    first, second = np.meshgrid(np.arange(P), np.arange(P), indexing="ij")
    wave = np.cos(2 * np.pi * np.arange(P) / P)
    assert distance_irrelevance(wave[(second - first) % P]) == pytest.approx(0, abs=1e-12)
    assert distance_irrelevance(wave[(first + second) % P]) == pytest.approx(1)


def test_the_logit_of_each_sum_is_that_of_its_right_answer():
    class Adding(torch.nn.Module):
        """Gives the sum of its two numbers the logit 100 a + b, and all else none."""

        embedding = torch.nn.Embedding(P + 2, 1)

        def forward(self, tokens):
            assert (tokens[:, 0] == P + 1).all() and (tokens[:, 3] == P).all()
            out = torch.zeros(*tokens.shape, P + 2)
            out[torch.arange(len(tokens)), -1, (tokens[:, 1] + tokens[:, 2]) % P] = 100.0 * tokens[:, 1] + tokens[:, 2]
            return out

    found = right_logits(Adding(), P, P + 1)
    assert found[3, 7] == 307 and found[10, 10] == 1010


def test_the_figure_has_a_colour_per_architecture():
    axes = STUDY.figure(table(0.9, 0.3)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "other"]
