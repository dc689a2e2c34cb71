"""Mamba-2 against what transformers runs for five published families, and its own state and start."""

import pytest
import torch

from archs.mixers.mamba2 import Mamba2
from archs.visibility import BIDIRECTIONAL, CAUSAL

SIZES = {"head_dim": 16, "state_size": 12, "conv_width": 4}


def build(width=32, dtype=torch.float64, **options):
    """A mixer in which every term matters."""
    torch.manual_seed(0)
    mixer = Mamba2(width, **SIZES | options).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def tokens(B, T, width=32, dtype=torch.float64):
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def published(family):
    """transformers' mixer of a family with two groups, and the options that express it here."""
    pytest.importorskip("transformers")
    from transformers.models.bamba import modeling_bamba as bamba
    from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
    from transformers.models.mamba2 import modeling_mamba2 as mamba2
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    hybrid = {
        "hidden_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 12,
        "mamba_chunk_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    match family:
        case "mamba2":
            config = mamba2.Mamba2Config(
                hidden_size=32, num_heads=4, head_dim=16, n_groups=2, state_size=12, chunk_size=16, use_bias=True,
                num_hidden_layers=1,
            )  # fmt: skip
            return mamba2.Mamba2Mixer(config, 0), {"bias": True}
        case "bamba":
            config = bamba.BambaConfig(**hybrid, num_hidden_layers=1, attn_layer_indices=[])
            return bamba.BambaMixer(config, 0), {}
        case "granitemoehybrid":
            config = granite.GraniteMoeHybridConfig(
                **hybrid, num_hidden_layers=1, layer_types=["mamba"], mamba_conv_bias=False
            )
            return granite.GraniteMoeHybridMambaLayer(config, 0), {"conv_bias": False}
        case "nemotron_h":
            config = nemotron.NemotronHConfig(
                hidden_size=32, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=12, chunk_size=16,
                time_step_min=0.5, layers_block_type=["mamba"],
            )  # fmt: skip
            return nemotron.NemotronHMamba2Mixer(config, 0), {"dt_limit": (0.5, float("inf"))}
        case _:
            norm, norm_before_gate = family != "falcon_h1", family == "falcon_h1, norm before gate"
            config = falcon.FalconH1Config(
                **hybrid, mamba_d_ssm=64, num_hidden_layers=1, mamba_rms_norm=norm,
                mamba_norm_before_gate=norm_before_gate, ssm_in_multiplier=0.7,
                ssm_multipliers=[0.5, 1.5, 2.0, 0.8, 1.2],
            )  # fmt: skip
            mixer = falcon.FalconH1Mixer(config, 0)
            mixer.mup_vector = falcon.compute_mup_vector(config)
            return mixer, {"norm": norm, "norm_before_gate": norm_before_gate}


@torch.no_grad()
def copy_weights(theirs, ours):
    """The multipliers of Falcon-H1 act on the projection, and so go into its weight."""
    scale = getattr(theirs, "ssm_in_multiplier", 1.0) * getattr(theirs, "mup_vector", torch.ones(1, 1, 1))[0, 0]
    state = {}
    for name, p in theirs.named_parameters():
        name = name.replace("conv1d.", "conv_").replace("norm.", "norm_")
        p = p.squeeze(1) if name == "conv_weight" else p
        state[name] = p * scale[:, None] if name == "in_proj.weight" else p
    ours.load_state_dict(state)


@pytest.mark.parametrize(
    "family",
    [
        "mamba2",
        "bamba",
        "granitemoehybrid",
        "nemotron_h",
        "falcon_h1",
        "falcon_h1, norm after gate",
        "falcon_h1, norm before gate",
    ],
)
def test_equals_the_published_mixer_with_the_same_weights(family):
    torch.manual_seed(0)
    theirs, options = published(family)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3 if p.dim() > 1 else 1.0)
    ours = Mamba2(32, **SIZES, groups=2, heads=4, norm_eps=1e-5 if family != "granitemoehybrid" else 1e-6, **options)
    copy_weights(theirs, ours)
    x = tokens(2, 50, dtype=torch.float32)
    with torch.no_grad():
        truth, got = theirs(x), ours(x, CAUSAL)[0]
    assert (got - truth).abs().max() < 1e-4 * truth.std()


def test_the_width_decides_the_heads_unless_they_are_given():
    for mixer, sizes in (
        (build(32), (4, 16, 64)),
        (build(36, groups=2), (4, 18, 72)),
        (build(32, heads=3, groups=3), (3, 16, 48)),
    ):
        assert (mixer.heads, mixer.head_dim, mixer.out_proj.in_features) == sizes


def test_fresh_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    mixer = Mamba2(512, head_dim=2, state_size=4)
    A, dt = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    for values, low, high in ((A, 1, 16), (dt, 1e-3, 0.1), (mixer.conv_weight, -0.5, 0.5)):
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    assert (mixer.D == 1).all() and (mixer.norm_weight == 1).all()


def test_the_state_has_the_size_that_an_empty_one_has():
    mixer = build(dtype=torch.bfloat16)
    empty = mixer.empty_state(2)
    _, state = mixer(tokens(2, 5, dtype=torch.bfloat16), CAUSAL, empty)
    assert state.nbytes == empty.nbytes == 2 * (4 * 4 * 16 * 12 + 2 * 3 * (64 + 2 * 12))
    assert state.memory.dtype == empty.memory.dtype == torch.float32


def test_bidirectional_reads_a_reversed_sequence_as_the_sequence_reversed():
    mixer, x = build(groups=2), tokens(2, 70)
    torch.testing.assert_close(mixer(x.flip(1), BIDIRECTIONAL)[0], mixer(x, BIDIRECTIONAL)[0].flip(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 5}, "width 64 cannot be cut .* groups of 5"),
        ({"heads": 4, "groups": 3}, "4 heads cannot share 3 groups"),
    ],
)
def test_mixers_that_cannot_be_built_say_why(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)
