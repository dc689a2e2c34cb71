"""Public implementations with random weights, converted: the same logits, whole and token by token."""

import pytest
import torch

from archs.pretrained import SUPPORTED, from_pretrained, from_transformers

tf = pytest.importorskip("transformers", reason="the public implementations are in the test extra")

V = 97
SIZES = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=V,
    intermediate_size=80, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
HEAD = SIZES | dict(head_dim=24)
LOCAL = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
ROPE = dict(rope_theta=5000.0)
YARN = ROPE | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)
LLAMA3 = ROPE | dict(
    rope_type="llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
)
LATENT = SIZES | dict(
    num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
    n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=24, n_group=4, topk_group=2,
    first_k_dense_replace=1,
)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=12, mamba_n_groups=2)
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=V, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "llama": lambda: tf.LlamaConfig(**SIZES, rope_parameters=ROPE | dict(rope_type="default")),
    "llama tied, llama3 scaling, biases": lambda: tf.LlamaConfig(
        **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama linear scaling": lambda: tf.LlamaConfig(
        **SIZES, rope_parameters=ROPE | dict(rope_type="linear", factor=4.0)
    ),
    "llama yarn": lambda: tf.LlamaConfig(**SIZES, rope_parameters=YARN | dict(truncate=True)),
    "qwen3": lambda: tf.Qwen3Config(**HEAD),
    "gemma3": lambda: tf.Gemma3TextConfig(**HEAD | LOCAL, query_pre_attn_scalar=40),
    "olmo3": lambda: tf.Olmo3Config(**SIZES | LOCAL),
    "gpt_oss": lambda: tf.GptOssConfig(
        **HEAD | LOCAL, num_local_experts=6, num_experts_per_tok=2, rope_parameters=YARN
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**HEAD | MOE, norm_topk_prob=True),
    "qwen3_moe, one layer dense": lambda: tf.Qwen3MoeConfig(**HEAD | MOE, mlp_only_layers=[0], norm_topk_prob=False),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **HEAD | MOE | dict(num_hidden_layers=4, head_dim=32),
        shared_expert_intermediate_size=40,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**LATENT),
    "deepseek_v3, no latent of queries, halves, yarn": lambda: tf.DeepseekV3Config(
        **LATENT | dict(q_lora_rank=None),
        rope_interleave=False,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7, truncate=True),
    ),
    # So many heads leave hardly a score at zero: of equal scores ours takes the latest, theirs any.
    "deepseek_v32": lambda: tf.DeepseekV32Config(**LATENT, index_topk=5, index_n_heads=16, index_head_dim=12),
    "deepseek_v32, yarn": lambda: tf.DeepseekV32Config(
        **LATENT, index_topk=5, index_n_heads=16, index_head_dim=12,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7, truncate=True),
    ),
    "lfm2": lambda: tf.Lfm2Config(
        **SIZES | dict(num_hidden_layers=3), full_attn_idxs=[1], block_auto_adjust_ff_dim=False, tie_embedding=False
    ),
    "mamba2": lambda: tf.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=12, n_groups=2, vocab_size=V,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, chunk_size=16,
    ),
    "bamba": lambda: tf.BambaConfig(**SIZES | MAMBA | dict(num_hidden_layers=3), attn_layer_indices=[1]),
}  # fmt: skip
every = pytest.mark.parametrize("name", CONFIGS)


def public(name):
    """A model of random weights so large that every term of it moves the logits."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").float().eval()
    with torch.no_grad():
        biases = ((key, b) for key, b in model.named_buffers() if "correction" in key)
        for key, p in (*model.named_parameters(), *biases):
            # Rates far above one forget all within a token, and the norm behind then magnifies rounding (theirs, by
            # float64: ten times ours).
            if "A_log" in key:
                p.uniform_(-2.0, 0.5)
            else:
                p.add_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2))
    return model


def tokens(B, T):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def distance(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.std()).item()


@every
@torch.no_grad()
def test_logits_are_those_of_the_public_implementation(name):
    theirs, x = public(name), tokens(2, 45)
    expected = theirs(x, use_cache=False).logits
    assert expected.std() > 0.1
    assert distance(from_transformers(theirs)(x), expected) < 1e-4


@every
@torch.no_grad()
def test_decoding_step_by_step_gives_the_same_logits(name):
    theirs, x = public(name), tokens(2, 45)
    expected = theirs(x, use_cache=False).logits
    model = from_transformers(theirs)
    logits, states = model.prefill(x[:, :31])
    got = [logits]
    for t in range(31, 45):
        logits, states = model.step(x[:, t], states)
        got.append(logits[:, None])
    assert distance(torch.cat(got, 1), expected) < 1e-4


@every
@torch.no_grad()
def test_every_weight_of_the_public_model_matters(name):
    """Without this the test of the logits could not see a term that is left out."""
    theirs, x = public(name), tokens(2, 45)
    model = from_transformers(theirs)
    expected = model(x)
    seen = set()
    for key, p in model.named_parameters():
        kind = ".".join(part for part in key.split(".") if not part.isdigit())
        if kind in seen:
            continue
        kept = p.clone()
        # Noise and not a factor: a norm behind a matrix takes factors out again.
        p.add_(0.5 * p.std(correction=0).clamp(min=0.1) * torch.randn_like(p))
        moved = distance(model(x), expected)
        p.copy_(kept)
        if moved > 1e-3:
            seen.add(kind)
    kinds = {".".join(part for part in key.split(".") if not part.isdigit()) for key, _ in model.named_parameters()}
    assert kinds - seen == set()


@torch.no_grad()
def test_a_sharded_checkpoint_is_read_from_its_folder(tmp_path):
    theirs, x = public("qwen3_moe"), tokens(2, 20)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert distance(from_pretrained(tmp_path)(x), theirs(x).logits) < 1e-4


def test_every_supported_type_is_proven_here():
    assert {make().model_type for make in CONFIGS.values()} == set(SUPPORTED)


def test_other_types_and_empty_folders_are_refused(tmp_path):
    opt = tf.OPTForCausalLM(tf.OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16))
    with pytest.raises(
        ValueError, match="model type 'opt' is not supported; these are: bamba, deepseek_v3, deepseek_v32, gemma3_text"
    ):
        from_transformers(opt)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        from_pretrained(tmp_path)
