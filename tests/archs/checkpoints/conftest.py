"""Models of the public implementations, small and of random weights, in the families and variants that we read."""

import pytest
import torch

V = 50
SIZES = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
HEAD = SIZES | dict(head_dim=12)
LOCAL = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
WINDOW, NO_WINDOW = dict(use_sliding_window=True, sliding_window=7), dict(use_sliding_window=False)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1)
THETA = dict(rope_theta=5000.0)
YARN = THETA | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
DEEPSEEK_YARN = YARN | dict(mscale=1.0, mscale_all_dim=0.7)
LLAMA3 = THETA | dict(
    rope_type="llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
)
LATENT = SIZES | dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=12, n_group=4, topk_group=2,
    first_k_dense_replace=1,
)  # fmt: skip
FAMILIES = {
    "gpt2": dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "llama": SIZES | dict(rope_parameters=THETA | dict(rope_type="default")),
    "qwen3": HEAD | WINDOW | dict(max_window_layers=1),
    "qwen3_moe": HEAD | MOE | WINDOW | dict(norm_topk_prob=True),
    "qwen3_next": HEAD | MOE | dict(
        head_dim=16, layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=20,
        linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4,
    ),
    "gemma3_text": HEAD | LOCAL | dict(query_pre_attn_scalar=40),
    "olmo3": SIZES | LOCAL,
    "gpt_oss": HEAD | LOCAL | dict(
        num_local_experts=6, num_experts_per_tok=2, rope_parameters=YARN | dict(truncate=False)
    ),
    "deepseek_v3": LATENT,
    # So many heads leave hardly a score at zero: of equal scores ours takes the latest, theirs any.
    "deepseek_v32": LATENT | dict(index_topk=5, index_n_heads=16, index_head_dim=12),
    "lfm2": SIZES | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba2": dict(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=12, n_groups=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, chunk_size=16,
    ),
    "bamba": SIZES | dict(
        attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=12, mamba_n_groups=2,
        mamba_chunk_size=16,
    ),
}  # fmt: skip
FAMILIES = {name: config | dict(model_type=name) for name, config in FAMILIES.items()}
VARIANTS = FAMILIES | {
    "gpt2, scores scaled by the layer alone, untied": FAMILIES["gpt2"] | dict(
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False
    ),
    "llama tied, llama3 scaling, biases": FAMILIES["llama"] | dict(
        rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama linear scaling": FAMILIES["llama"] | dict(rope_parameters=THETA | dict(rope_type="linear", factor=4.0)),
    "llama yarn": FAMILIES["llama"] | dict(rope_parameters=YARN),
    "qwen3, no windows, tied": FAMILIES["qwen3"] | NO_WINDOW | dict(hidden_size=48, tie_word_embeddings=True),
    "qwen3_moe, one layer dense, no windows": FAMILIES["qwen3_moe"] | NO_WINDOW | dict(
        mlp_only_layers=[0], norm_topk_prob=False
    ),
    "qwen3_next, biases": FAMILIES["qwen3_next"] | dict(attention_bias=True),
    "deepseek_v3, no latent of queries, halves, yarn": LATENT | dict(
        model_type="deepseek_v3", q_lora_rank=None, rope_interleave=False, rope_parameters=DEEPSEEK_YARN
    ),
    "deepseek_v32, yarn": FAMILIES["deepseek_v32"] | dict(rope_parameters=DEEPSEEK_YARN),
    "lfm2, untied, adjusted width": FAMILIES["lfm2"] | dict(
        tie_word_embeddings=False, block_auto_adjust_ff_dim=True, block_multiple_of=16
    ),
    "bamba, biases": FAMILIES["bamba"] | dict(attention_bias=True, mlp_bias=True, mamba_proj_bias=True),
}  # fmt: skip


def pytest_generate_tests(metafunc):
    for argument, cases in (("family", FAMILIES), ("variant", VARIANTS)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases.values(), ids=cases.keys())


@pytest.fixture(scope="session")
def transformers():
    """The public implementations: the one place where they are imported."""
    module = pytest.importorskip("transformers", reason="the public implementations are in the test extra")
    module.logging.set_verbosity(module.logging.CRITICAL)
    module.logging.disable_progress_bar()
    return module


@pytest.fixture
def families():
    return FAMILIES


@pytest.fixture
def build(transformers):
    """config -> a public model of weights so large that every term of it moves the logits."""

    @torch.no_grad()
    def build(config: dict):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        biases = ((key, b) for key, b in model.named_buffers() if "correction" in key)
        for key, p in (*model.named_parameters(), *biases):
            # Rates far above one forget all within a token, and the norm behind then magnifies rounding (theirs, by
            # float64: ten times ours).
            if "A_log" in key:
                p.uniform_(-2.0, 0.5)
            else:
                p.add_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
        return model

    return build


@pytest.fixture
def tokens():
    return torch.randint(V, (2, 45), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def distance():
    """Largest difference between two logits, in standard deviations."""
    return lambda ours, theirs: ((ours - theirs).abs().max() / theirs.std()).item()
