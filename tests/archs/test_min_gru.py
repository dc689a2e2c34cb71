"""minGRU is the recurrence that the paper writes down."""

import torch

from archs.visibility import CAUSAL
from tests.contracts.discovery import build_mixer, vectors

T = 70  # more than one chunk of the scan


def test_it_is_a_moving_average_of_candidates_by_gates_of_their_own_token():
    mixer, x = build_mixer("min_gru.min_gru"), vectors(2, T)
    taps = mixer.conv_weight[:, None]
    projected = torch.nn.functional.pad(mixer.in_proj(x).mT, (taps.shape[-1] - 1, 0))
    both = torch.nn.functional.conv1d(projected, taps, mixer.conv_bias, groups=len(taps)).mT
    z, candidate = both[..., : mixer.inner].sigmoid(), both[..., mixer.inner :]
    h, expected = torch.zeros_like(z[:, 0]), []
    for t in range(T):
        h = (1 - z[:, t]) * h + z[:, t] * candidate[:, t]
        expected.append(mixer.out_proj(h))
    torch.testing.assert_close(mixer(x, CAUSAL)[0], torch.stack(expected, 1))
