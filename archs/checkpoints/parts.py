"""Mixers and channels that many families share: what builds ours, and the rules of their tensors."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from archs.channels.mlp import MLP
from archs.channels.moe import MoE
from archs.checkpoints.assembly import Part
from archs.checkpoints.rules import Rule, rows, same, shifted, stacked
from archs.checkpoints.settings import Settings
from archs.mixers.attention import Attention

PRE_NORMS = {"mixer_norm": "input_layernorm", "channel_norm": "post_attention_layernorm"}
FULL, SLIDING = "full_attention", "sliding_attention"
FULL_OR_SLIDING = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}
GATE_UP_DOWN = "gate_proj", "up_proj", "down_proj"


class Heads(NamedTuple):
    """Heads of queries, those of keys and values, and the channels of each."""

    count: int
    kv_heads: int
    head_dim: int


def heads_of(settings: Settings, width: int, optional: Sequence[str] = ()) -> Heads:
    """The heads that a config describes.

    Args:
        optional: which of num_key_value_heads and head_dim may be absent, and then follow from the number of heads and
            the width; a family that has another default has to name them.

    Raises:
        ValueError: for heads that do not share those of keys and values evenly.
    """

    def given(name: str) -> int | None:
        return settings.take(name, None) if name in optional else settings.take(name)

    heads = settings.count("num_attention_heads")
    kv_heads, head_dim = given("num_key_value_heads") or heads, given("head_dim") or width // heads
    if heads % kv_heads:
        settings.refuse("num_key_value_heads", f"a divisor of num_attention_heads={heads} is")
    return Heads(heads, kv_heads, head_dim)


def windows_of(settings: Settings, kinds: Sequence[str]) -> dict[str, int | None]:
    """The window of each kind of attention, for layers of these kinds.

    Raises:
        ValueError: for layers with a window, and none given.
    """
    window = settings.take("sliding_window", None)
    if SLIDING in kinds and window is None:
        settings.refuse("sliding_window", f"a number of tokens is, for layers of {SLIDING}")
    return {FULL: None, SLIDING: window}


def attention(
    heads: Heads,
    *,
    bias: bool = False,
    qk_norm: str | None = None,
    shift: float = 0.0,
    gate: bool = False,
    out: str = "o_proj",
    norms: tuple[str, str] = ("q_norm", "k_norm"),
    name: str = "self_attn",
    **options,
) -> Part:
    """Attention of three projections. shift: added to the weights of the QK-norm. gate: whether the rows of each query
    head are followed by those of its gate. options: further ones of `Attention`."""
    count, kv_heads, head_dim = heads
    sizes = [count * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    rules = []
    for kind in ("weight", "bias") if bias else ("weight",):
        qkv = [f"{x}_proj.{kind}" for x in "qkv"]
        rules += [_gated(kind, qkv, count, sizes) if gate else rows(f"qkv.{kind}", qkv, sizes)]
        rules.append(same(f"out_proj.{kind}", f"{out}.{kind}"))
    if qk_norm:
        rules += [shifted(f"{x}_norm", f"{theirs}.weight", shift) for x, theirs in zip("qk", norms, strict=True)]
    if options.get("sinks"):
        rules.append(same("sinks", "sinks"))
    build = partial(
        Attention,
        heads=count,
        head_dim=head_dim,
        queries_per_kv=count // kv_heads,
        bias=bias,
        qk_norm=qk_norm,
        gate=gate,
        **options,
    )
    return Part(name, build, rules)


def _gated(kind: str, qkv: Sequence[str], heads: int, sizes: Sequence[int]) -> Rule:
    def fold(x):
        q, gate = (y.flatten(0, 1) for y in x[0].unflatten(0, (heads, 2, -1)).unbind(1))
        return torch.cat([q, x[1], x[2]]), gate

    def unfold(x):
        q, k, v = x[0].split(sizes)
        return torch.stack([y.unflatten(0, (heads, -1)) for y in (q, x[1])], 1).flatten(0, 2), k, v

    return Rule((f"qkv.{kind}", f"gate.{kind}"), tuple(qkv), fold, unfold)


def gated_mlp(
    hidden: int, activation: str, *, bias: bool = False, name: str = "mlp", names: Sequence[str] = GATE_UP_DOWN
) -> Part:
    """A gated MLP of three projections, by their names."""
    build = partial(MLP, activation=activation, gated=True, hidden=hidden, bias=bias)
    return Part(name, build, gated_mlp_rules(hidden, bias, names))


def gated_mlp_rules(hidden: int, bias: bool = False, names: Sequence[str] = GATE_UP_DOWN) -> list[Rule]:
    gate, up, down = names
    rules = []
    for kind in ("weight", "bias") if bias else ("weight",):
        rules.append(rows(f"gate_up.{kind}", [f"{gate}.{kind}", f"{up}.{kind}"], [hidden, hidden]))
        rules.append(same(f"out_proj.{kind}", f"{down}.{kind}"))
    return rules


def experts(
    *,
    experts: int,
    hidden: int,
    fused: bool,
    shared: int = 0,
    shared_hidden: int | None = None,
    shared_name: str = "shared_experts",
    choice_bias: bool = False,
    **options,
) -> Part:
    """A mixture of gated experts. fused: whether a file holds all experts in one tensor, or each by itself. options:
    further ones of `MoE`."""
    rules = [same("router.linear.weight", "gate.weight")]
    if choice_bias:
        rules.append(same("router.choice_bias", "gate.e_score_correction_bias", float32=True))
    if fused:
        rules += [same("gate_up.weight", "experts.gate_up_proj"), same("out_proj.weight", "experts.down_proj")]
    else:
        each = [f"experts.{e}.{x}_proj.weight" for e in range(experts) for x in ("gate", "up")]
        rules.append(stacked("gate_up.weight", each, pieces=2))
        rules.append(stacked("out_proj.weight", [f"experts.{e}.down_proj.weight" for e in range(experts)]))
    if shared:
        width = shared * (hidden if shared_hidden is None else shared_hidden)
        rules += [rule.within("shared.", f"{shared_name}.") for rule in gated_mlp_rules(width)]
    if options.get("shared_gate"):
        rules.append(same("shared_gate.weight", f"{shared_name}_gate.weight"))
    build = partial(
        MoE,
        experts=experts,
        gated=True,
        hidden=hidden,
        shared=shared,
        shared_hidden=shared_hidden,
        bias_update_rate=1e-3 if choice_bias else None,
        **options,
    )
    return Part("mlp", build, rules)
