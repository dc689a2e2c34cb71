"""Rotary positions beyond the length of training: each way to stretch them by its formula, and in every backbone."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.positions import NTK, Linear, Llama3, Rotary, Yarn
from archs.visibility import CAUSAL, Visibility, block_causal

halves = st.integers(2, 64)
factors = st.floats(1, 64)
bases = st.sampled_from([10000.0, 500000.0, 1e6])


def plain(half, base):
    """Radians per token of each pair of dimensions, float32 as a model has them."""
    return base ** (-torch.arange(half, dtype=torch.float32) / half)


def written_out(half, base, factor, length):
    """YaRN's frequencies and its factor on queries and keys, dimension by dimension in float64."""

    def dimension(turns):
        return 2 * half * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), 2 * half - 1)
    frequencies = []
    for i in range(half):
        frequency = float(base) ** (-2 * i / (2 * half))
        ramp = (i - low) / (high - low) if high > low else math.inf if i > low else 0.0
        ramp = min(max(ramp, 0.0), 1.0)
        frequencies.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return np.array(frequencies), 0.1 * math.log(factor) + 1


@given(half=halves, base=bases, factor=factors, length=st.integers(64, 8192))
def test_yarn_is_its_formula(half, base, factor, length):
    got_D, magnitude = Yarn(factor, length)(plain(half, base), base)
    expected, growth = written_out(half, base, factor, length)
    np.testing.assert_allclose(got_D.double().numpy(), expected, rtol=3e-6)
    assert magnitude == pytest.approx(growth, rel=1e-12)


@pytest.mark.thorough
@settings(max_examples=30, deadline=None)
@given(
    half=halves,
    base=bases,
    factor=st.floats(1.01, 64),
    length=st.integers(64, 8192),
    kind=st.sampled_from(["yarn", "linear"]),
)
def test_frequencies_are_those_of_the_public_implementation(half, base, factor, length, kind):
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    from transformers import LlamaConfig

    rope = {"rope_type": kind, "rope_theta": base, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = length
    config = LlamaConfig(
        hidden_size=2 * half, num_attention_heads=1, max_position_embeddings=int(length * factor), rope_parameters=rope
    )  # fmt: skip
    expected_D, growth = functions[kind](config, torch.device("cpu"))
    scaling = Yarn(factor, length) if kind == "yarn" else Linear(factor)
    got_D, magnitude = scaling(plain(half, base), base)
    torch.testing.assert_close(got_D, expected_D, rtol=3e-6, atol=0)
    assert magnitude == pytest.approx(growth, rel=1e-6)


@given(half=halves, base=bases, factor=factors)
def test_ntk_is_a_larger_base_that_stretches_the_slowest_dimension_by_its_factor(half, base, factor):
    got_D, magnitude = NTK(factor)(plain(half, base), base)
    larger = base * factor ** (2 * half / (2 * half - 2))
    expected = larger ** (-np.arange(half) / half)
    np.testing.assert_allclose(got_D.double().numpy(), expected, rtol=3e-6)
    assert magnitude == 1 and got_D[0] == 1
    assert got_D[-1].item() * factor == pytest.approx(plain(half, base)[-1].item(), rel=1e-5)


@pytest.mark.parametrize("scaling", [Linear(1.0), NTK(1.0), Yarn(1.0, 256), Llama3(1.0, 256, 1.0, 4.0)])
def test_a_factor_of_one_changes_nothing(scaling):
    x_BTHD = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Rotary(scaling=scaling)(x_BTHD, torch.arange(9)), Rotary()(x_BTHD, torch.arange(9)))


def test_yarn_raises_all_scores_by_the_square_of_its_magnitude():
    q, k = torch.randn(2, 1, 1, 2, 16, generator=torch.Generator().manual_seed(0)).double()
    here = torch.zeros(1)  # no rotation
    stretched = Rotary(scaling=Yarn(16.0, 256))
    score = (stretched(q, here) * stretched(k, here)).sum(-1)
    torch.testing.assert_close(score, (q * k).sum(-1) * (0.1 * math.log(16) + 1) ** 2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Yarn(0.5, 256), "factor=0.5 must be at least 1"),
        (lambda: NTK(float("nan")), "factor=nan must be at least 1"),
        (lambda: Yarn(4.0, 0), "original_length=0 must be the tokens"),
        (lambda: Yarn(4.0, 256, beta_fast=1.0), "beta_slow=1.0 and beta_fast=1.0 must be above 0"),
        (lambda: Rotary(base=1.0), "rotary base 1.0 must be above 1"),
        (lambda: Rotary(scaling=NTK(2.0))(torch.ones(1, 1, 1, 2), torch.zeros(1)), "at least 4 rotated dimensions"),
    ],
)
def test_settings_that_mean_nothing_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("name", ["packed", "decoding", "two copies"])
def test_turns_are_computed_once_per_pass_and_are_those_of_each_layer_by_itself(name, monkeypatch):
    """Two encodings among four layers, one of them stretched, so two tables."""
    encodings = {"near": Rotary(), "far": Rotary(base=1e6, scaling=Yarn(4.0, 64))}
    mixers = {name: partial(Attention, head_dim=8, queries_per_kv=1, position=p) for name, p in encodings.items()}
    model = LanguageModel(11, 16, ["near", "far"], mixers, depth=4).double()
    tokens = torch.arange(24).remainder(11).view(2, 12)
    visibility = block_causal(3) if name == "two copies" else CAUSAL
    if name == "packed":
        visibility = visibility.packed((tokens == 0) | (tokens == 4))

    def run():
        if name != "decoding":
            return model.hidden(tokens, visibility)
        _, states = model.extend(tokens[:, :7], model.empty_states(2))
        made.clear()
        return model.extend(tokens[:, 7:], states)[0]

    made, turns = [], Rotary.turns
    monkeypatch.setattr(Rotary, "turns", lambda self, *rest: made.append(self) or turns(self, *rest))
    once = run()
    assert made == list(encodings.values())
    monkeypatch.setattr(Visibility, "for_one_pass", lambda self: self)
    each = run()
    assert torch.equal(once, each) and len(made) == 4 + (2 if name != "decoding" else 0)


@pytest.mark.parametrize(
    ("fraction", "dimensions", "rotated"),
    [(0.25, 64, 16), (0.25, 24, 6), (0.25, 4, 2), (0.1, 8, 2), (0.5, 6, 4), (1, 6, 6)],
)
def test_a_fraction_of_a_head_is_rotated_to_the_nearest_pair(fraction, dimensions, rotated):
    x = torch.randn(1, 3, 1, dimensions)
    changed = (Rotary(fraction=fraction)(x, torch.arange(3))[:, 1:] != x[:, 1:]).any(1).flatten()
    assert changed.tolist() == [True] * rotated + [False] * (dimensions - rotated)


def test_heads_of_an_odd_number_of_dimensions_are_refused():
    with pytest.raises(ValueError, match="heads of 5 dimensions cannot be rotated in pairs"):
        Rotary(fraction=0.5)(torch.randn(1, 3, 1, 5), torch.arange(3))
