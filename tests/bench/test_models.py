"""The benchmark of models refuses to time two that differ, and times those that do not."""

from pathlib import Path

import pytest
import torch

from archs import checkpoints
from experiments.bench import models

pytest.importorskip("transformers", reason="the models to run beside are in the test extra")
TINY = {
    "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
SPARSE = {
    "model_type": "deepseek_v32", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "index_topk": 128, "index_n_heads": 2, "index_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_both_sides_work_and_the_ratio_is_that_of_their_speeds(bench, capsys, mode):
    shape = "{" + ",".join(f"{key}: {value}" for key, value in TINY.items()) + "}"
    sizes = (f"{mode}.batches=[2]", f"{mode}.lengths=[16]")
    path, found, text = bench("models=[tiny]", f"+shapes.tiny={shape}", f"modes=[{mode}]", *sizes, "rounds=2")
    assert path == Path("results/bench/models_cpu.json")
    assert [(row["precision"], row["mode"], row["batch"]) for row in found["rows"]] == [
        ("float32", mode, 2),
        ("bf16", mode, 2),
    ]
    for row in found["rows"]:
        assert row["ours tokens/s"] > 0 and row["transformers tokens/s"] > 0
        assert row["ratio"] == pytest.approx(row["ours tokens/s"] / row["transformers tokens/s"], abs=0.02)
    assert found["rounds"] == 2 and found["date"] in text and text in capsys.readouterr().out


@pytest.mark.parametrize("shape", [TINY, SPARSE], ids=["qwen3", "deepseek_v32"])
def test_both_sides_learn_the_same_weights(shape):
    learnt = []
    for side in models.pair(shape).values():
        side.logits(torch.randint(shape["vocab_size"], (2, 16))).square().sum().backward()
        learnt.append(sum(x.numel() for x in side.model.parameters() if x.grad is not None))
    assert learnt[0] == learnt[1]
    ours = [x for x in side.model.parameters() if x.requires_grad]  # what compiling takes the gradients of
    assert sum(x.numel() for x in ours) == learnt[1]


@pytest.mark.slow
def test_compiled_models_state_how_long_compiling_took(bench):
    shape = "{" + ",".join(f"{key}: {value}" for key, value in TINY.items()) + "}"
    _, found, text = bench(
        "models=[tiny]", f"+shapes.tiny={shape}", "precisions=[float32]", "train.compiled=[false,true]",
        "train.batches=[2]", "train.lengths=[16]", "rounds=1",
    )  # fmt: skip
    eager, compiled = found["rows"]
    assert not eager["compiled"] and eager["ours s to compile"] is None
    assert compiled["compiled"] and compiled["ours s to compile"] > 0 and "transformers s to compile" in text


def test_a_model_without_a_shape_is_refused_by_name(bench, capsys):
    with pytest.raises(SystemExit):
        bench("models=[gpt5]")
    assert "error: no shape 'gpt5': choose from qwen3" in capsys.readouterr().err


def test_a_mode_that_is_none_is_refused_by_name(bench, capsys):
    with pytest.raises(SystemExit):
        bench("modes=[speak]")
    assert "error: no mode 'speak': choose from train, prefill, decode" in capsys.readouterr().err


def test_models_that_differ_are_not_timed(monkeypatch):
    def other(folder):
        model = read(folder)
        model.norm.weight.data.mul_(1.1)
        return model

    read = checkpoints.read
    monkeypatch.setattr(checkpoints, "read", other)
    with pytest.raises(ValueError, match="qwen3: logits differ by"):
        models.pair(TINY)
