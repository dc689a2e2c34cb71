"""Checkpoints as they are published: other layouts, shards and dtypes, and what is wrong with a folder."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from archs.channels.mlp import MLP
from archs.checkpoints import read, read_config, write
from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.positions import Rotary


@pytest.fixture
def folder(families, build, tmp_path):
    """A family -> the folder of a checkpoint of it."""

    def folder(family, **options):
        build(families[family]).save_pretrained(tmp_path / family, **options)
        return tmp_path / family

    return folder


def rewritten(folder, change):
    """The folder after its tensors were changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def test_a_sharded_checkpoint_is_read(folder, tokens):
    whole = read(folder("qwen3_moe"))(tokens)
    (folder("qwen3_moe") / "model.safetensors").unlink()
    shards = folder("qwen3_moe", max_shard_size="30KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert torch.equal(read(shards)(tokens), whole)


@torch.no_grad()
@pytest.mark.parametrize("kind, experts", [("qwen3_moe", 6), ("qwen3_next", 6), ("deepseek_v3", 8)])
def test_experts_in_one_tensor_are_read_as_those_by_themselves(kind, experts, folder, tokens):
    path = folder(kind)
    expected = read(path)(tokens)

    def fuse(tensors):
        for layer in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
            gate, up, down = (
                torch.stack([tensors.pop(f"{layer}.experts.{e}.{x}_proj.weight") for e in range(experts)])
                for x in ("gate", "up", "down")
            )
            tensors |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}

    assert torch.equal(read(rewritten(path, fuse))(tokens), expected)


@torch.no_grad()
def test_gpt2_without_a_stem_and_with_masks_is_read(folder, tokens):
    path = folder("gpt2")
    expected = read(path)(tokens)

    def as_released(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}

    assert torch.equal(read(rewritten(path, as_released))(tokens), expected)


@pytest.mark.parametrize(
    "kind, name",
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("deepseek_v3", "model.layers.2.embed_tokens.weight"),
     ("qwen3_next", "mtp.fc.weight")],
)  # fmt: skip
def test_tensors_that_have_no_part_in_the_forward_pass_are_left(kind, name, folder):
    read(rewritten(folder(kind), lambda tensors: tensors.update({name: torch.ones(3)})))


def test_a_tied_head_may_stand_in_the_file_as_the_embedding_that_it_is(folder):
    path = folder("gpt2")
    head = load_file(path / "model.safetensors")["transformer.wte.weight"]
    read(rewritten(path, lambda tensors: tensors.update({"lm_head.weight": head})))
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        read(rewritten(path, lambda tensors: tensors.update({"lm_head.weight": head + 1})))


@pytest.mark.thorough
@torch.no_grad()
def test_the_dtype_of_a_file_is_kept(family, build, transformers, tokens, distance, tmp_path):
    build(family).bfloat16().save_pretrained(tmp_path)
    model, wide = read(tmp_path), read(tmp_path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    expected = theirs(tokens, use_cache=False).logits
    assert distance(wide(tokens), expected) < 1e-4
    assert (model(tokens) - expected).square().mean().sqrt() < 0.3 * expected.std()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} <= {torch.float32}  # the biases of the choice of experts

    write(model, tmp_path / "ours", read_config(tmp_path))
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert {x.dtype for name, x in tensors.items() if "correction" not in name} == {torch.bfloat16}
    assert read_config(tmp_path / "ours")["dtype"] == "bfloat16"


@torch.no_grad()
def test_a_bfloat16_file_that_is_read_in_float32_is_written_as_it_was(family, build, tmp_path):
    build(family).bfloat16().save_pretrained(tmp_path)
    model = read(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    write(model, tmp_path / "ours", read_config(tmp_path), dtype=torch.bfloat16)
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(after[name].to(x.dtype), x), name


@pytest.mark.parametrize("kind", ["deepseek_v32", "qwen3_next"])
def test_a_model_is_written_after_training_into_the_folder_that_it_came_from(kind, folder, tokens):
    path = folder(kind)
    model = read(path).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(tokens).square().mean() + sum(model.auxiliary_losses().values())
    loss.backward()
    optimizer.step()
    model.after_step()
    write(model, path, read_config(path))
    with torch.no_grad():
        assert torch.allclose(read(path)(tokens), model.eval()(tokens), atol=1e-5)


def own_model(base):
    attention = partial(Attention, head_dim=8, queries_per_kv=1, position=Rotary(base))
    mlp = partial(MLP, activation="silu", gated=True, hidden=48)
    norm = partial(torch.nn.RMSNorm, eps=1e-6)
    model = LanguageModel(50, 32, ["attention+mlp"], {"attention": attention}, {"mlp": mlp}, depth=2, norm=norm)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


OWN = dict(
    model_type="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    rms_norm_eps=1e-6, rope_theta=5000.0,
)  # fmt: skip


@torch.no_grad()
def test_a_model_of_our_own_is_written_as_a_checkpoint(transformers, tokens, distance, tmp_path):
    model = own_model(5000.0)
    write(model, tmp_path, OWN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert distance(model(tokens), theirs(tokens).logits) < 1e-4


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(rope_theta=10000.0), "position is Rotary(base=10000.0"),
        (dict(rms_norm_eps=1e-5), "eps is 1e-05, and the model's is 1e-06"),
        (dict(intermediate_size=40), "is [80, 32], and the model's is [96, 32]"),
        (dict(num_hidden_layers=1), "has no place for the model's blocks.1."),
        (dict(attention_bias=True), "bias, which the model lacks"),
        (dict(hidden_act="relu"), "hidden_act='relu' is not modelled"),
        (dict(model_type="opt"), "model type 'opt' is not supported"),
    ],
)
def test_a_model_that_is_not_what_the_config_describes_is_not_written(config, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        write(own_model(5000.0), tmp_path / "folder", OWN | config)
    assert not (tmp_path / "folder").exists()


def broken(change):
    """A test's case: what is done to the tensors in a folder."""
    return lambda path: rewritten(path, change)


def sharded(names):
    def change(path):
        (path / "model.safetensors").rename(path / "one.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return change


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda path: (path / "config.json").unlink(), FileNotFoundError, "holds no config.json: give the folder"),
        (lambda path: (path / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), ValueError, "config.json holds no JSON object"),
        (lambda path: (path / "config.json").write_text("{}"), ValueError, "model type None is not supported"),
        (lambda path: (path / "model.safetensors").unlink(), FileNotFoundError, "holds neither model.safetensors nor"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), ValueError, "bin, a pickle"),
        (broken(lambda x: x.pop("model.norm.weight")), ValueError, "describes lacks model.norm.weight"),
        (broken(lambda x: x.update(other=torch.ones(1))), ValueError, "describes has no place for other"),
        (broken(lambda x: x.update({"model.norm.weight": torch.ones(3)})), ValueError, "weight is [3], and [32] by"),
        (sharded({"a": "one.safetensors", "b": "two.safetensors"}), FileNotFoundError, "lacks two.safetensors"),
        (sharded({"a": "../one.safetensors"}), ValueError, "which does not lie in its folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(change, error, message, folder):
    path = folder("llama")
    change(path)
    with pytest.raises(error, match=re.escape(message)) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_other_types_of_model_are_refused_with_those_that_are_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(ValueError, match="model type 'opt' is not supported; these are: bamba, deepseek_v3, .*, qwen3"):
        read(tmp_path)


def test_a_setting_that_is_not_modelled_is_refused_with_its_value(folder):
    path = folder("gemma3_text")
    (path / "config.json").write_text(json.dumps(read_config(path) | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ValueError, match="^gemma3_text: final_logit_softcapping=30.0 is not modelled: "):
        read(path)
