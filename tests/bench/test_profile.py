"""The profile gives every operator to one part."""

from types import SimpleNamespace

import pytest

from experiments.bench.profile import part_of


def event(*callers):
    """An operator and those that called it, the outermost first."""
    found = None
    for name in callers:
        found = SimpleNamespace(name=name, cpu_parent=found)
    return found


@pytest.mark.parametrize(
    ("callers", "part"),
    [
        (["aten::linear", "aten::mm"], "projections"),
        (["aten::scaled_dot_product_attention", "aten::bmm"], "attention"),
        (["archipelago::gated_delta_rule_chunked", "aten::bmm"], "mixer"),
        (["aten::mul"], "rest"),
    ],
)
def test_an_operator_belongs_to_the_outermost_caller_that_has_a_part(callers, part):
    assert part_of(event(*callers)) == part


@pytest.mark.thorough
def test_the_parts_of_a_step_make_up_the_whole_of_it(bench):
    pytest.importorskip("transformers", reason="the models to run beside are in the test extra")
    shape = "{model_type: qwen3, vocab_size: 64, hidden_size: 32, num_hidden_layers: 1, intermediate_size: 32, "
    shape += "num_attention_heads: 2, num_key_value_heads: 2, head_dim: 16}"
    settings = ("models=[tiny]", f"+shapes.tiny={shape}", "train.lengths=[16]", "precisions=[float32]", "rounds=2")
    _, found, _ = bench("profile=true", *settings)
    assert [row["side"] for row in found["rows"]] == ["transformers", "ours"]
    for row in found["rows"]:
        shares = [int(row[part][:-1]) for part in ("attention", "mixer", "projections", "optimiser", "rest")]
        assert row["ms"] > 0 and abs(sum(shares) - 100) <= 3 and shares[0] and shares[2]
