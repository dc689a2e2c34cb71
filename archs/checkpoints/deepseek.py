"""DeepSeek-V3 (DeepSeek-AI, arXiv 2412.19437) and V3.2, which adds an indexer (DeepSeek-AI, arXiv 2512.02556)."""

from functools import partial
from typing import Any

from archs.checkpoints.assembly import Blueprint, Layer, Part, assemble
from archs.checkpoints.parts import PRE_NORMS, experts, gated_mlp
from archs.checkpoints.rope import rope_parameters, rotary, yarn_growth
from archs.checkpoints.rules import same
from archs.checkpoints.settings import Settings
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.sparse_attention import SparseAttention

INDEXED = {"indexed_attention": "indexed", "deepseek_sparse_attention": "indexed"}


def v3_blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    depth, dense = settings.count("num_hidden_layers"), settings.take("first_k_dense_replace")
    settings.require("q_lora_rank")  # null is a value, and its absence another
    mixer = _latent_attention(
        settings, rope_parameters(settings), settings.take("q_lora_rank", None), settings.take("rope_interleave", True)
    )
    settings.same("head_dim", settings.take("qk_rope_head_dim"), "qk_rope_head_dim")
    settings.ignore("pretraining_tp")
    return _deepseek(settings, names, mixer, [i >= dense for i in range(depth)])


def v32_blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    depth, dense = settings.count("num_hidden_layers"), settings.take("first_k_dense_replace", 3)
    rope, q_rank = rope_parameters(settings), settings.take("q_lora_rank")
    mixer = _sparse_attention(settings, rope, _latent_attention(settings, rope, q_rank, interleaved=True))
    settings.layer_types(["indexed_attention"] * depth, INDEXED)
    kinds = ["dense" if i < dense else "sparse" for i in range(depth)]
    kinds = settings.layer_types(kinds, {"dense": "dense", "sparse": "sparse"}, "mlp_layer_types")
    settings.only("mlp_bias", False)
    settings.ignore("head_dim")
    return _deepseek(settings, names, mixer, [kind == "sparse" for kind in kinds])


def _deepseek(settings: Settings, names: frozenset[str], mixer: Part, sparse: list[bool]) -> Blueprint:
    width, activation = settings.take("hidden_size"), settings.activation("hidden_act", "silu")
    count, groups = settings.count("n_routed_experts"), settings.count("n_group")
    if count % groups or (groups > 1 and count // groups < 2):
        settings.refuse("n_group", f"a number of groups of two or more of n_routed_experts={count} is")
    limit, top_k = settings.count("topk_group", most=groups), settings.count("num_experts_per_tok")
    if top_k > limit * (count // groups):
        settings.refuse("num_experts_per_tok", f"so many in topk_group={limit} groups of {count // groups} experts is")
    options = {
        "experts": count,
        "hidden": settings.take("moe_intermediate_size"),
        "top_k": top_k,
        "shared": settings.count("n_shared_experts"),
        "normalise": settings.take("norm_topk_prob", True),
        "route_scale": settings.take("routed_scaling_factor", 2.5),
        "groups": groups,
        "group_limit": limit,
        "activation": activation,
        "gate": "sigmoid",
        "choice_bias": True,
    }
    settings.only("scoring_func", "sigmoid")
    settings.only("topk_method", "noaux_tc")
    settings.only("moe_layer_freq", 1)
    settings.ignore("aux_loss_alpha", "ep_size", "output_router_logits", "router_aux_loss_coef", "seq_aux")
    mlp = gated_mlp(settings.take("intermediate_size"), activation)
    channels = [
        experts(fused=f"model.layers.{i}.mlp.experts.gate_up_proj" in names, **options) if has_experts else mlp
        for i, has_experts in enumerate(sparse)
    ]
    layers = [Layer(mixer, channel, PRE_NORMS) for channel in channels]
    # Behind the layers stand those that predict further ahead.
    last = len(layers) + settings.take("num_nextn_predict_layers", 1)
    unused = [rf"model\.layers\.{i}\..*" for i in range(len(layers), last)]
    eps = settings.take("rms_norm_eps", 1e-6)
    return assemble(settings, layers, width, eps=eps, tied=False, unused=unused)


def _latent_attention(settings: Settings, rope: dict[str, Any], q_rank: int | None, interleaved: bool) -> Part:
    heads, kv_rank = settings.take("num_attention_heads"), settings.take("kv_lora_rank")
    nope, rotated = settings.take("qk_nope_head_dim"), settings.take("qk_rope_head_dim")
    settings.same("num_key_value_heads", heads, "num_attention_heads")
    settings.ignore("qk_head_dim")
    settings.only("attention_bias", False)
    scale = (nope + rotated) ** -0.5
    if rope.get("mscale_all_dim"):
        # DeepSeek's YaRN leaves queries and keys as long as they are and scales the scores, by this twice.
        scale *= yarn_growth(rope["factor"], rope["mscale_all_dim"]) ** 2
    build = partial(
        LatentAttention,
        head_dim=settings.take("v_head_dim"),
        heads=heads,
        position=rotary(settings, rope, rotated, interleaved=interleaved),
        kv_rank=kv_rank,
        q_rank=q_rank,
        nope_dim=nope,
        rope_dim=rotated,
        scale=scale,
    )
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out_proj": "o_proj"}
    if q_rank is None:
        names |= {"q_up": "q_proj"}
    else:
        names |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    return Part("self_attn", build, [same(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in names.items()])


def _sparse_attention(settings: Settings, rope: dict[str, Any], attention: Part) -> Part:
    rotated, dim = settings.take("qk_rope_head_dim"), settings.take("index_head_dim")
    if dim < rotated:
        settings.refuse("index_head_dim", f"qk_rope_head_dim={rotated} or more is")
    build = partial(
        SparseAttention,
        attention=attention.build,
        index_heads=settings.take("index_n_heads"),
        index_dim=dim,
        # Its pairs of dimensions are halves, whatever those of the attention are.
        index_position=rotary(settings, rope | {"partial_rotary_factor": rotated / dim}, dim, partial=True),
        top_k=settings.count("index_topk"),
    )
    names = {"query.weight": "wq_b.weight", "key.weight": "wk.weight", "weights.weight": "weights_proj.weight"}
    names |= {f"key_norm.{kind}": f"k_norm.{kind}" for kind in ("weight", "bias")}
    rules = [rule.within("attention.", "") for rule in attention.rules]
    rules += [same(f"indexer.{ours}", f"indexer.{theirs}") for ours, theirs in names.items()]
    return Part("self_attn", build, rules)
