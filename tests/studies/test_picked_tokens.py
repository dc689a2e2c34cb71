"""The indexer's study looks at the weight of attention to all tokens that its picks would have."""

from functools import partial

import pytest
import torch

from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.sparse_attention import SparseAttention
from archs.positions import Rotary
from archs.visibility import CAUSAL
from experiments.studies.picked_tokens import shares

D, T, K = 16, 40, 4
PLAIN = partial(Attention, heads=2, head_dim=None, qk_norm=None, queries_per_kv=1, position=None)


def mixer(attention=PLAIN):
    torch.manual_seed(0)
    rotary = Rotary(10000.0)
    return SparseAttention(D, attention=attention, index_heads=2, index_dim=8, index_position=rotary, top_k=K)


@torch.no_grad()
def test_the_best_tokens_have_the_most_weight_and_all_have_as_much_where_attention_is_even():
    sparse, x_BTD = mixer(), torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    found = shares(sparse, x_BTD, CAUSAL)
    assert 0 < found["last"] < found["best"] and 0 < found["picked"] < found["best"] < 1
    sparse.attention.qkv.weight[:D].zero_()  # no queries
    even = shares(sparse, x_BTD, CAUSAL)
    expected = sum(K / (t + 1) for t in range(K, T)) / (T - K)
    assert even == pytest.approx(dict.fromkeys(("picked", "last", "best"), expected))


def test_attention_that_keeps_latents_is_refused():
    latent = partial(LatentAttention, heads=2, head_dim=None, kv_rank=4, rope_dim=2, position=Rotary(10000.0))
    with pytest.raises(ValueError, match="over LatentAttention is not looked into"):
        shares(mixer(latent), torch.zeros(1, T, D), CAUSAL)
