"""The duties of every mixer (`archs.contracts.Mixer`), found by its config."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.contracts import Mixer
from archs.mixers.recurrent import RecurrentMixer
from archs.mixers.sparse_attention import Indexer
from archs.parameters import linear_layers
from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, Visibility, block_causal
from tests.contracts.discovery import LENGTH, MIXERS, WIDTH, build_mixer, vectors

every = pytest.mark.parametrize("name", MIXERS)
both = pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
VISIBILITIES = {Kind.CAUSAL: CAUSAL, Kind.BIDIRECTIONAL: BIDIRECTIONAL, Kind.BLOCK_CAUSAL: block_causal(4)}
every_visibility = pytest.mark.parametrize(
    ("name", "visibility"),
    [
        pytest.param(name, VISIBILITIES[kind], id=f"{name}-{kind.value}")
        for name in MIXERS
        for kind in Kind
        if kind in build_mixer(name).visibilities
    ],
)
LONG = 70  # more than one chunk of a scan


def picks(mixer: Mixer) -> bool:
    """Whether an indexer picks the tokens that are read."""
    return any(isinstance(module, Indexer) for module in mixer.modules())


@every
def test_it_says_what_it_can_do_and_names_what_it_writes_to_the_residual_stream(name):
    mixer = build_mixer(name)
    assert isinstance(mixer, Mixer) and {Kind.CAUSAL} <= mixer.visibilities <= set(Kind)
    inner = {id(layer) for layer in linear_layers(mixer)}
    written = list(mixer.residual_projections())
    assert written and {id(layer) for layer in written} <= inner
    assert all(layer.out_features == WIDTH for layer in written)
    with torch.no_grad():  # nothing else reaches the stream
        for layer in written:
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    assert mixer(vectors(2, 9), CAUSAL)[0].abs().max() == 0


@every_visibility
def test_it_keeps_shape_and_dtype_and_returns_no_state_where_none_is_given(name, visibility):
    mixer = build_mixer(name, torch.float32)
    x = vectors(3, 2 * LENGTH, torch.float32)
    y, state = mixer(x, visibility)
    assert y.shape == x.shape and y.dtype == x.dtype and state is None


@every
@pytest.mark.parametrize("sizes", [[LONG - 5, 1, 1, 3], [1, 2, 63, 4]], ids=str)
def test_a_sequence_handed_over_in_pieces_equals_one_pass(name, sizes):
    mixer, x = build_mixer(name).eval(), vectors(3, LONG)
    whole, _ = mixer(x, CAUSAL)
    state, pieces = mixer.empty_state(3), []
    for piece, seen in zip(x.split(sizes, dim=1), itertools.accumulate(sizes), strict=True):
        y, state = mixer(piece, CAUSAL, state)
        pieces.append(y)
        assert state.length == seen
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-8, atol=1e-8)


@every
def test_one_can_go_back_to_a_state_and_on_from_its_copies(name):
    mixer, x = build_mixer(name).eval(), vectors(2, LENGTH)
    _, state = mixer(x[:, :11], CAUSAL, mixer.empty_state(2))
    first, _ = mixer(x[:, 11:], CAUSAL, state)
    again, after = mixer(x[:, 11:], CAUSAL, state)
    assert torch.equal(first, again) and (state.length, after.length) == (11, LENGTH)
    copies = state.repeat(2)
    assert copies.nbytes == 2 * state.nbytes and copies.length == 11
    pairs, _ = mixer(x[:, 11:].repeat_interleave(2, dim=0), CAUSAL, copies)
    torch.testing.assert_close(pairs, again.repeat_interleave(2, dim=0))


@every_visibility
def test_packed_documents_are_each_as_if_alone(name, visibility):
    mixer = build_mixer(name).eval()
    L = 41
    x = vectors(2, L * visibility.copies)
    starts = torch.zeros(2, L, dtype=torch.bool)
    starts[0, [0, 13, 14, 30]], starts[1, 27] = True, True  # one of a single token, and one begun without a mark
    packed, _ = mixer(x, visibility.packed(starts))
    for row, begins in enumerate(([0, 13, 14, 30, L], [0, 27, L])):
        for begin, end in itertools.pairwise(begins):
            tokens = torch.cat([torch.arange(begin, end) + copy * L for copy in range(visibility.copies)])
            alone, _ = mixer(x[row : row + 1, tokens], visibility)
            torch.testing.assert_close(packed[row : row + 1, tokens], alone, rtol=1e-9, atol=1e-9)


@every
def test_packed_documents_take_no_state(name):
    mixer, starts = build_mixer(name), torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="packed documents start from nothing"):
        mixer(vectors(1, 5), CAUSAL.packed(starts), mixer.empty_state(1))


@every
@pytest.mark.parametrize("t", [0, 1, 40, LONG - 1])
def test_a_changed_token_changes_nothing_before_it_when_causal_and_its_neighbours_when_bidirectional(name, t):
    mixer, x = build_mixer(name).eval(), vectors(1, LONG)
    y = x.clone()
    y[0, t] += 1
    causal = (mixer(x, CAUSAL)[0] - mixer(y, CAUSAL)[0]).abs().amax(-1)[0]
    assert (causal[:t] == 0).all() and causal[t] > 0
    change = (mixer(x, BIDIRECTIONAL)[0] - mixer(y, BIDIRECTIONAL)[0]).abs().amax(-1)[0]
    near = change[max(0, t - 3) : t + 4]
    # A linear attention without a convolution, or a pick of an indexer, may pass a neighbour by.
    assert change[t] > 0 and ((near > 0).sum() > 1 or picks(mixer))


@every
@both
def test_gradients_reach_every_parameter(name, visibility):
    mixer = build_mixer(name)
    loss = mixer(vectors(2, 40), visibility)[0].square().sum()
    parts = [part for part in mixer.modules() if isinstance(part, Mixer)]
    (loss + sum(sum(part.auxiliary_losses().values()) for part in parts)).backward()
    assert [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(isinstance(x, float) for part in parts for x in part.telemetry().values())


def counted_by_pytorch(mixer: Mixer, T: int, visibility: Visibility) -> int:
    x = torch.zeros(1, T, WIDTH, device="meta")
    with FlopCounterMode(display=False) as counter:
        mixer.to("meta")(x, visibility)
    return counter.get_total_flops()


@every
def test_flops_are_those_that_pytorch_counts_where_every_pair_is_seen(name):
    mixer = build_mixer(name, torch.float32)
    for T, visibility in ((1, CAUSAL), (5, BIDIRECTIONAL)):
        assert mixer.flops(T, visibility) == counted_by_pytorch(mixer, T, visibility) > 0


@pytest.mark.thorough
@every
@both
@pytest.mark.parametrize("T", [17, 64, 100])
def test_flops_are_never_more_than_pytorch_counts_and_those_of_a_recurrence_the_same(name, T, visibility):
    """PyTorch counts pairs that are not seen too."""
    mixer = build_mixer(name, torch.float32)
    counted, ours = counted_by_pytorch(mixer, T, visibility), mixer.flops(T, visibility)
    assert ours <= counted
    assert ours == counted or not isinstance(mixer, RecurrentMixer)


@every
def test_the_bytes_of_a_state_are_those_of_its_tensors_and_do_not_depend_on_where_it_is_made(name):
    real, meta = build_mixer(name, torch.float32), build_mixer(name, torch.float32).to("meta")
    sizes = {}
    for T in (1, 60, 120):
        _, state = real(vectors(2, T, torch.float32), CAUSAL, real.empty_state(2))
        _, same = meta(torch.zeros(2, T, WIDTH, device="meta"), CAUSAL, meta.empty_state(2))
        sizes[T] = state.nbytes
        assert state.nbytes == same.nbytes > 0
    if isinstance(real, RecurrentMixer):
        assert sizes[1] == sizes[60] == sizes[120] == real.empty_state(2).nbytes


@pytest.mark.thorough
@every
@both
def test_under_bfloat16_autocast_it_stays_near_float32(name, visibility):
    mixer, x = build_mixer(name, torch.float32).eval(), vectors(2, LONG, torch.float32)
    truth = mixer(x, visibility)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x, visibility)[0]
    # Rounded scores may let an indexer pick other tokens.
    assert (got - truth).abs().mean() < (0.3 if picks(mixer) else 0.03) * truth.std()
