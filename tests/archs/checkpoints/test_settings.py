"""Every field of every family's config, changed: our logits are the public ones, or the field is refused."""

import json

import pytest
import torch

from archs.checkpoints import read
from archs.checkpoints.settings import NEUTRAL

pytestmark = pytest.mark.thorough

ABSENT = "absent"
THETA = dict(rope_theta=900.0)
YARN = THETA | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = THETA | dict(rope_type="llama3", factor=4.0, low_freq_factor=1, high_freq_factor=4)
ROPES = [
    dict(rope_type="default"),
    THETA | dict(rope_type="default"),
    THETA | dict(rope_type="default", partial_rotary_factor=0.5),
    THETA | dict(rope_type="linear", factor=3.0),
    YARN,
]
MORE_ROPES = [
    THETA | dict(rope_type="default", factor=3.0),
    THETA | dict(rope_type="dynamic", factor=3.0),
    THETA | dict(rope_type="proportional", partial_rotary_factor=0.5),
    THETA | dict(rope_type="longrope", short_factor=[1.5] * 4, long_factor=[3.0] * 4, factor=4.0),
    THETA | dict(rope_type="linear", factor=4.0, mscale_all_dim=0.9),
    dict(rope_type="linear", factor=4.0),
    YARN | dict(factor=0.5, truncate=False),
    YARN | dict(truncate=None),
    YARN | dict(attention_factor=1.7, mscale=2.0, mscale_all_dim=0.9),
    YARN | dict(beta_fast=2, beta_slow=0.5),
    YARN | dict(beta_fast=1, beta_slow=2),
    YARN | dict(original_max_position_embeddings=4),
    YARN | dict(rope_theta=2.0, original_max_position_embeddings=4096),
    YARN | dict(mscale=0.9),
    YARN | dict(mscale_all_dim=0.9),
    YARN | dict(mscale=0.9, mscale_all_dim=0.5),
    dict(YARN, original_max_position_embeddings=None),
    {key: x for key, x in YARN.items() if key != "original_max_position_embeddings"},
    LLAMA3,
    LLAMA3 | dict(original_max_position_embeddings=16),
    LLAMA3 | dict(original_max_position_embeddings=16, low_freq_factor=4, high_freq_factor=1),
]
WITH_ALL_ROPES = "llama", "gemma3_text", "deepseek_v3"
SLIDING, FULL = "sliding_attention", "full_attention"
VALUES = {
    "attn_layer_indices": [[0], [], [0, 1]],
    "full_attn_idxs": [[0]],
    "head_dim": [8, 24],
    "index_n_heads": [20],
    "is_encoder_decoder": [True],
    "layer_types": [[FULL, FULL], [SLIDING, SLIDING], ["attention", FULL], ["chunked_attention", FULL], [FULL, "conv"],
                    [FULL], ["linear_attention", FULL]],
    "n_group": [2],
    "qk_rope_head_dim": [4],
    "mamba_d_head": ["auto", 16],
    "mlp_layer_types": [["sparse", "dense"], ["sparse", "sparse"]],
    "mlp_only_layers": [[0], [0, 1]],
    "n_routed_experts": [16],
    "num_attention_heads": [8],
    "num_experts_per_tok": [1, 4],
    "num_key_value_heads": [1, 4],
    "query_pre_attn_scalar": [64],
    "sliding_window": [5, 1],
    "time_step_limit": [[0.01, 0.1], [0.0, 0.05]],
}  # fmt: skip
# Fields that older files have, or those of other families: of each family's own class they are none.
ELSEWHERE = dict(
    attention_bias=[True], attention_chunk_size=[4], block_ff_dim=[24], final_logit_softcapping=[3.0],
    full_attention_interval=[1, 2], head_dim=[8, 24], layer_types=[[FULL, FULL], [SLIDING, FULL]], num_experts=[8],
    original_max_position_embeddings=[16], partial_rotary_factor=[0.5, 1.0], quantization_config=[{"bits": 4}],
    rope_interleave=[False], rope_local_base_freq=[900.0], rope_theta=[900.0], sliding_window=[5],
    sliding_window_pattern=[2], tie_embedding=[True, False], use_sliding_window=[True],
)  # fmt: skip
# Fields that follow from the one that is changed, and would contradict it.
FOLLOWING = {
    "full_attention_interval": ["layer_types"],
    "full_attn_idxs": ["layer_types"],
    "max_window_layers": ["layer_types"],
    "num_hidden_layers": ["layer_types", "mlp_layer_types"],
    "partial_rotary_factor": ["rope_parameters"],
    "qk_rope_head_dim": ["head_dim", "qk_head_dim"],
    "rope_local_base_freq": ["rope_parameters"],
    "rope_theta": ["rope_parameters"],
    "sliding_window_pattern": ["layer_types"],
    "use_sliding_window": ["layer_types"],
}
# Fields that can only be changed together with others.
TOGETHER = {
    ("deepseek_v3", "num_attention_heads"): [dict(num_attention_heads=2, num_key_value_heads=2)],
    ("deepseek_v3", "num_key_value_heads"): [dict(num_attention_heads=2, num_key_value_heads=2)],
    ("deepseek_v32", "num_attention_heads"): [dict(num_attention_heads=2, num_key_value_heads=2)],
    ("deepseek_v32", "num_key_value_heads"): [dict(num_attention_heads=2, num_key_value_heads=2)],
    ("bamba", "hidden_size"): [dict(hidden_size=64, mamba_n_heads=16)],
    ("bamba", "mamba_n_heads"): [dict(mamba_n_heads=4, mamba_d_head=16)],
    ("mamba2", "head_dim"): [dict(num_heads=4, head_dim=16)],
    ("mamba2", "hidden_size"): [dict(hidden_size=64, num_heads=16)],
    ("mamba2", "num_heads"): [dict(num_heads=4, head_dim=16)],
}
SILENT = dict(
    _attn_implementation_autoset=True, _name_or_path="x", architectures=["Other"], attention_dropout=0.3,
    auto_map={"AutoConfig": "other.Config"}, bos_token_id=3, chunk_size_feed_forward=4, dtype="bfloat16",
    eos_token_id=[4, 5], id2label={"0": "x"}, initializer_range=0.5, label2id={"x": 0}, output_attentions=True,
    output_hidden_states=True, pad_token_id=7, problem_type="regression", torch_dtype="bfloat16",
    transformers_version="4.0.0", unsloth_fixed=True, use_cache=False,
)  # fmt: skip
# The fields of each family's class that have values which are not modelled.
REFUSED = {
    "gpt2": {"activation_function", "add_cross_attention"},
    "llama": {"hidden_act", "rope_parameters"},
    "qwen3": {"hidden_act", "rope_parameters"},
    "qwen3_moe": {"hidden_act", "rope_parameters"},
    "qwen3_next": {"hidden_act"},
    "gemma3_text": {"hidden_activation", "rope_parameters", "attn_logit_softcapping", "final_logit_softcapping",
                    "use_bidirectional_attention"},
    "olmo3": {"hidden_act", "rope_parameters"},
    "gpt_oss": {"hidden_act", "rope_parameters", "swiglu_alpha", "swiglu_limit"},
    "deepseek_v3": {"hidden_act", "rope_parameters", "attention_bias"},
    "deepseek_v32": {"hidden_act", "rope_parameters", "attention_bias", "layer_types", "mlp_bias"},
    "lfm2": {"rope_parameters", "conv_bias"},
    "mamba2": {"hidden_act"},
    "bamba": {"hidden_act"},
}  # fmt: skip


def values_of(kind, name, value):
    """Other plausible values of a field."""
    if name in ("rope_parameters", "rope_scaling"):
        ropes = ROPES + (MORE_ROPES if kind in WITH_ALL_ROPES and name == "rope_parameters" else [])
        if name == "rope_parameters" and kind in ("gemma3_text", "olmo3"):
            ropes = [{FULL: rope, SLIDING: {"rope_theta": 400.0}} for rope in ropes] + [{SLIDING: ROPES[3]}, ROPES[3]]
        return [{"type": rope["rope_type"], **rope} for rope in ropes] if name == "rope_scaling" else ropes
    if name in VALUES:
        return VALUES[name]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value]
    if isinstance(value, float):
        return [value + 0.3]
    if isinstance(value, str):
        return ["gelu", "relu", "swish"]
    return [7, 0.5, True]


def changes_of(kind, fields):
    """(field, what is changed in the config), of all fields but those that ought to leave the logits alone."""
    for name, value in fields.items():
        if name in NEUTRAL:
            continue
        for changed in (*values_of(kind, name, value), None, ABSENT):
            if changed != value or type(changed) is not type(value):
                yield name, {name: changed} | dict.fromkeys(FOLLOWING.get(name, ()), ABSENT)
        for together in TOGETHER.get((kind, name), ()):
            yield name, together
    for name, values in (ELSEWHERE | {"rope_scaling": values_of(kind, "rope_scaling", None)}).items():
        if name not in fields:
            for changed in values:
                yield name, {name: changed} | dict.fromkeys(FOLLOWING.get(name, ()), ABSENT)


def without_absent(fields):
    return json.loads(json.dumps({name: value for name, value in fields.items() if value is not ABSENT}))


def named(name, error):
    return name in error or ("rope" in name and "rope_parameters" in error)


def ours_of(folder, fields):
    """Our model of the tensors in a folder and these fields, or why there is none."""
    (folder / "config.json").write_text(json.dumps(without_absent(fields)))
    try:
        return read(folder)
    except ValueError as error:
        return str(error)


@pytest.fixture
def compare(build, tokens, distance, tmp_path):
    """A config -> how far our logits are from the public ones, None where there are none of these, or why not ours."""

    @torch.no_grad()
    def compare(fields):
        try:
            theirs = build(without_absent(fields | {"dtype": ABSENT, "torch_dtype": ABSENT}))
            expected = theirs(tokens[:, :20], use_cache=False).logits
            theirs.save_pretrained(tmp_path)
        except Exception:
            return None
        ours = ours_of(tmp_path, fields)
        return ours if isinstance(ours, str) else distance(ours(tokens[:, :20]), expected)

    return compare


@pytest.fixture
def fields(family, transformers):
    """All fields of a family's config, as config.json would hold them."""
    return json.loads(json.dumps(transformers.AutoConfig.for_model(**family).to_dict()))


def test_a_changed_field_changes_our_logits_as_theirs_or_is_refused_by_name(family, fields, compare, tmp_path):
    kind = family["model_type"]
    assert compare(fields) < 1e-4
    built, refused, unbuilt = set(), set(), []
    for name, changed in changes_of(kind, fields):
        plausible = name in fields and changed[name] not in (None, ABSENT)
        # What we refuse in any case need not be built.
        found = None if plausible else ours_of(tmp_path, fields | changed)
        if not (isinstance(found, str) and named(name, found)):
            found = compare(fields | changed)
            if found is None:
                unbuilt.append(changed)
            else:
                built.add(name)
        if isinstance(found, str):
            assert named(name, found), (changed, found)
            refused |= {name} if plausible else set()
        assert found is None or isinstance(found, str) or found < 1e-4, (changed, found)
    print(f"{kind}: the public implementation cannot be built or run with {unbuilt}")
    assert built >= fields.keys() - NEUTRAL
    assert refused == REFUSED[kind] | {"is_encoder_decoder"}


def test_fields_that_say_nothing_about_logits_change_none(fields, compare):
    # Where return_dict is false, the public implementations do not run.
    assert {"model_type", "return_dict", *SILENT} == NEUTRAL
    assert compare(fields | SILENT) < 1e-4
