"""The bench refuses to time two models that differ, and times those that do not."""

import pytest

from experiments import bench

pytest.importorskip("transformers", reason="the models to run beside are in the test extra")
TINY = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_both_sides_take_training_steps_and_the_ratio_is_that_of_their_speeds(precision):
    row = bench.race(TINY, precision, batch=2, length=16, rounds=2)
    assert row["ours tokens/s"] > 0 and row["transformers tokens/s"] > 0
    assert row["ratio"] == pytest.approx(row["ours tokens/s"] / row["transformers tokens/s"], abs=0.02)


def test_models_that_differ_are_not_timed(monkeypatch):
    def other(theirs):
        model = convert(theirs)
        model.norm.weight.data.mul_(1.1)
        return model

    convert = bench.from_transformers
    monkeypatch.setattr(bench, "from_transformers", other)
    with pytest.raises(ValueError, match="qwen3: logits differ by"):
        bench.pair(TINY)
