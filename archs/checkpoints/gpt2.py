"""GPT-2 (Radford et al., 2019)."""

from functools import partial

from archs.channels.mlp import MLP
from archs.checkpoints.assembly import Blueprint, Ends, Layer, Part, assemble
from archs.checkpoints.rules import Rule, same, transposed
from archs.checkpoints.settings import Settings
from archs.mixers.attention import Attention


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, heads = settings.take("n_embd"), settings.take("n_head")
    inner = settings.take("n_inner", None)
    by_width = settings.take("scale_attn_weights", True)
    by_layer = settings.take("scale_attn_by_inverse_layer_idx", False)
    settings.only("add_cross_attention", False)
    # How scores are upcast is a matter of rounding; summaries are of another head.
    settings.ignore("reorder_and_upcast_attn", "attn_pdrop", "embd_pdrop", "resid_pdrop", "gradient_checkpointing")
    settings.ignore(*(f"summary_{x}" for x in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    settings.ignore("n_ctx", "task_specific_params", "_num_labels")
    if width % heads:
        settings.refuse("n_head", f"a divisor of n_embd={width} is")

    def attention(layer: int) -> Part:
        scale = ((width // heads) ** -0.5 if by_width else 1.0) / (layer + 1 if by_layer else 1)
        build = partial(
            Attention, heads=heads, head_dim=width // heads, queries_per_kv=1, position=None, bias=True, scale=scale
        )
        return Part("attn", build, _linear({"qkv": "c_attn", "out_proj": "c_proj"}))

    build = partial(
        MLP,
        activation=settings.activation("activation_function", "gelu_new"),
        gated=False,
        hidden=4 * width if inner is None else inner,
        bias=True,
    )
    mlp = Part("mlp", build, _linear({"gate_up": "c_fc", "out_proj": "c_proj"}))
    norms = {"mixer_norm": "ln_1", "channel_norm": "ln_2"}
    layers = [Layer(attention(i), mlp, norms) for i in range(settings.count("n_layer"))]
    # The first releases name no stem, and hold the causal masks.
    stem = "" if "wte.weight" in names else "transformer."
    positions = settings.take("n_positions")
    settings.same("max_position_embeddings", positions, "n_positions")
    ends = Ends(stem, "h", "wte", "ln_f", positions=positions, layer_norm=True)
    eps = settings.take("layer_norm_epsilon", 1e-5)
    masks = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
    return assemble(settings, layers, width, eps=eps, tied=True, ends=ends, unused=[masks])


def _linear(names: dict[str, str]) -> list[Rule]:
    """The rules of linear layers, whose matrices GPT-2 stores transposed."""
    return [
        rule
        for ours, theirs in names.items()
        for rule in (transposed(f"{ours}.weight", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias"))
    ]
