"""The config.json of models as they were released, older fields and all, beside the public implementations."""

import json

import pytest
import torch

from archs.checkpoints import read

# Of smaller sizes.
SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
    vocab_size=50, bos_token_id=1, eos_token_id=2, initializer_range=0.02, torch_dtype="float32", use_cache=True,
)  # fmt: skip
QWEN3 = SMALL | dict(
    attention_bias=False, attention_dropout=0.0, head_dim=16, hidden_act="silu", max_position_embeddings=40960,
    max_window_layers=28, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
    tie_word_embeddings=True, transformers_version="4.51.0", use_sliding_window=False,
)  # fmt: skip
EXPERTS = dict(
    decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=12, norm_topk_prob=True, num_experts=6,
    num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.001, tie_word_embeddings=False,
)  # fmt: skip
RELEASED = {
    "openai-community/gpt2": dict(
        model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, bos_token_id=0, embd_pdrop=0.1,
        eos_token_id=0, initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=64, n_embd=32, n_head=4, n_layer=2,
        n_positions=64, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, vocab_size=50,
        summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    ),
    "HuggingFaceTB/SmolLM2-135M": SMALL | dict(
        model_type="llama", attention_bias=False, attention_dropout=0.0, hidden_act="silu", is_llama_config=True,
        max_position_embeddings=8192, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B": SMALL | dict(
        model_type="llama", attention_bias=False, head_dim=8, hidden_act="silu", max_position_embeddings=131072,
        mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3",
                          original_max_position_embeddings=8192),
    ),
    "Qwen/Qwen3-0.6B": QWEN3 | dict(model_type="qwen3"),
    "Qwen/Qwen3-30B-A3B": QWEN3 | EXPERTS | dict(model_type="qwen3_moe"),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {key: x for key, x in QWEN3.items() if key not in (
        "max_window_layers", "sliding_window")} | EXPERTS | dict(
        model_type="qwen3_next", full_attention_interval=2, linear_conv_kernel_dim=4, linear_key_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_value_head_dim=8, partial_rotary_factor=0.25,
        shared_expert_intermediate_size=12,
    ),
    "google/gemma-3-1b-pt": SMALL | dict(
        model_type="gemma3_text", attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
        cache_implementation="hybrid", final_logit_softcapping=None, head_dim=16,
        hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=16,
        rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=5,
        sliding_window_pattern=2,
    ),
    "allenai/Olmo-3-7B": SMALL | dict(
        model_type="olmo3", attention_bias=False, attention_dropout=0.0, hidden_act="silu", rms_norm_eps=1e-6,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=65536, rope_theta=500000,
        rope_scaling=dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
                          original_max_position_embeddings=8192, rope_type="yarn"),
        sliding_window=5, tie_word_embeddings=False,
    ),
    "openai/gpt-oss-120b, in bfloat16": SMALL | dict(
        model_type="gpt_oss", attention_bias=True, attention_dropout=0.0, experts_per_token=2, head_dim=16,
        hidden_act="silu", initial_context_length=4096, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=131072, num_experts_per_tok=2, num_local_experts=6, output_router_logits=False,
        rms_norm_eps=1e-5, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=5, swiglu_limit=7.0,
        rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
                          rope_type="yarn", truncate=False),
        tie_word_embeddings=False,
    ),
    "deepseek-ai/DeepSeek-V3, in bfloat16": SMALL | dict(
        model_type="deepseek_v3", attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, ep_size=1,
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, first_k_dense_replace=1,
        hidden_act="silu", kv_lora_rank=24, max_position_embeddings=163840, moe_intermediate_size=12,
        moe_layer_freq=1, n_group=4, n_routed_experts=8, n_shared_experts=1, norm_topk_prob=True,
        num_experts_per_tok=2, num_key_value_heads=4, num_nextn_predict_layers=1, pretraining_tp=1, q_lora_rank=20,
        qk_nope_head_dim=12, qk_rope_head_dim=8, rms_norm_eps=1e-6, rope_theta=10000, routed_scaling_factor=2.5,
        rope_scaling=dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn",
                          original_max_position_embeddings=4096),
        scoring_func="sigmoid", seq_aux=True, tie_word_embeddings=False, topk_group=2, topk_method="noaux_tc",
        v_head_dim=10,
    ),
    "LiquidAI/LFM2-1.2B": {key: x for key, x in SMALL.items() if key != "intermediate_size"} | dict(
        model_type="lfm2", block_auto_adjust_ff_dim=True, block_dim=32, block_ff_dim=60, block_ffn_dim_multiplier=1.0,
        block_mlp_init_scale=1.0, block_multiple_of=16, block_norm_eps=1e-5, block_out_init_scale=1.0,
        block_use_swiglu=True, block_use_xavier_init=True, conv_L_cache=3, conv_bias=False, conv_dim=32,
        conv_dim_out=32, conv_use_xavier_init=True, full_attn_idxs=[1], max_position_embeddings=128000,
        norm_eps=1e-5, num_heads=4, rope_theta=1000000.0, use_pos_enc=True,
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": dict(
        model_type="mamba2", bos_token_id=0, chunk_size=16, conv_kernel=4, eos_token_id=0, expand=2, head_dim=8,
        hidden_act="silu", hidden_size=32, initializer_range=0.1, intermediate_size=64, layer_norm_epsilon=1e-5,
        n_groups=2, norm_before_gate=True, num_heads=8, num_hidden_layers=2, pad_token_id=0,
        rescale_prenorm_residual=False, residual_in_fp32=True, rms_norm=True, state_size=12,
        tie_word_embeddings=False, time_step_floor=0.0001, time_step_init_scheme="random", time_step_max=0.1,
        time_step_limit=[0.0, float("inf")], time_step_min=0.001, time_step_rank=2, time_step_scale=1.0,
        use_bias=False, use_cache=True, use_conv_bias=True, vocab_size=50,
    ),
    "ibm-ai-platform/Bamba-9B": SMALL | dict(
        model_type="bamba", attention_bias=False, attention_dropout=0.0, attn_layer_indices=[1], attn_rotary_emb=4,
        hidden_act="silu", mamba_chunk_size=16, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head="auto",
        mamba_d_state=12, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=8, mamba_proj_bias=False,
        max_position_embeddings=262144, mlp_bias=False, num_logits_to_keep=1, rms_norm_eps=1e-5, rope_scaling=None,
        rope_theta=10000.0, tie_word_embeddings=False,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASED)
def test_the_config_of_a_released_model_is_read(name, build, tokens, distance, tmp_path):
    theirs = build(json.loads(json.dumps(RELEASED[name])))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]))
    assert distance(read(tmp_path)(tokens), theirs(tokens, use_cache=False).logits) < 1e-4
