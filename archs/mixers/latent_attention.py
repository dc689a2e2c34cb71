"""Multi-head latent attention: keys and values of all heads from one small latent vector per token.

Shape letters: B sequences, T tokens, D model width, H heads, N key dimensions without position, V value dimensions, R
dimensions of the latent, E either of the last two.
"""

import torch
from torch import Tensor, nn

from archs.contracts import Mixer
from archs.low_rank import whole_weight
from archs.mixers.heads import cut_heads
from archs.mixers.softmax import attend, in_attention, positions_of
from archs.positions import Positions, Rotary
from archs.state import KVCache
from archs.visibility import Kind, Visibility


class LatentAttention(Mixer[KVCache]):
    """Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token's latent of kv_rank numbers gives the keys and values of all heads; a key of rope_dim numbers, which all
    heads share, carries its position. Only these two are cached. Training and a prompt without a past expand them to
    keys and values ("materialised"). What continues a cache folds the expansion into queries and outputs instead
    ("absorbed"), so that attention runs on the cached latents themselves, shared by all heads.

    Args:
        width: model width.
        head_dim: dimension of a head's values and of the part of its keys without position; where `heads` is None,
            nearly (see `cut_heads`).
        position: rotates the part of queries and keys with position.
        heads: number of heads, or None for as many as fill the width.
        kv_rank: dimension of the latent; None for 4 head_dim, as in DeepSeek-V3.
        q_rank: dimension of a latent of the queries, or None for queries straight from x.
        nope_dim, rope_dim: dimensions of the parts of a key without and with position; None for head_dim and half of
            it.
        scale: factor on the scores; None for (nope_dim + rope_dim) ** -0.5.
        norm_eps: of the norms on the latents.

    Raises:
        ValueError: when the width cannot be cut into such heads.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
        position: Rotary,
        heads: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        heads, head_dim = cut_heads(width, heads, head_dim)
        self.heads, self.value_dim, self.position = heads, head_dim, position
        self.kv_rank = 4 * head_dim if kv_rank is None else kv_rank
        self.nope_dim = head_dim if nope_dim is None else nope_dim
        self.rope_dim = max(2, head_dim // 4 * 2) if rope_dim is None else rope_dim
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5 if scale is None else scale
        self.q_down = nn.Linear(width, q_rank, bias=False) if q_rank is not None else None
        self.q_norm = nn.RMSNorm(q_rank, eps=norm_eps) if q_rank is not None else None
        self.q_up = nn.Linear(width if q_rank is None else q_rank, heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_down = nn.Linear(width, self.kv_rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.kv_rank, eps=norm_eps)
        self.kv_up = nn.Linear(self.kv_rank, heads * (self.nope_dim + self.value_dim), bias=False)
        self.out_proj = nn.Linear(heads * self.value_dim, width, bias=False)

    @property
    def visibilities(self) -> frozenset[Kind]:
        return frozenset(Kind)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Mix x; see `Mixer`."""
        absorbed = state is not None and state.length > 0
        q, latent = self.project(x_BTD, self.query_input(x_BTD), positions_of(x_BTD, visibility, state))
        if state is not None:
            latent, state = self.extend(latent, state)
        y_BTHE = attend(*self.heads_of(q, latent, absorbed), visibility, scale=self.scale)
        return self.output(y_BTHE, absorbed), state

    def query_input(self, x_BTD: Tensor) -> Tensor:
        """Return what queries are made of: their normalised latent [B, T, q_rank], or x where they have none."""
        return x_BTD if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_BTD))

    def project(self, x_BTD: Tensor, query_input: Tensor, position: Positions) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, nope_dim + rope_dim], and what is cached, the latent and behind it the key with position
        [B, T, 1, R + rope_dim]; position: of x."""
        q_nope, q_rope = (
            self.q_up(query_input).unflatten(-1, (self.heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        )
        latent, k_rope = self.kv_down(x_BTD)[:, :, None].split([self.kv_rank, self.rope_dim], dim=-1)
        q = torch.cat([q_nope, self.position(q_rope, position)], dim=-1)
        return q, torch.cat([self.kv_norm(latent), self.position(k_rope, position)], dim=-1)

    @staticmethod
    def extend(latent: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """What the new tokens may see, and the cache after them."""
        latent = in_attention(latent)
        latent, _, cache = cache.append(latent, latent[..., :0])
        return latent, cache

    def heads_of(self, q: Tensor, latent: Tensor, absorbed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values to attend with, of H heads materialised; absorbed, the queries reach into the latent
        space, and what is cached is the one head of keys, its beginning that of values."""
        if absorbed:
            k_up_HNR, _ = self._up()
            q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
            q = torch.cat([torch.einsum("bthn,hnr->bthr", q_nope, k_up_HNR), q_rope], dim=-1)
            k = latent.to(q.dtype)
            return q, k, k[..., : self.kv_rank]
        latent, k_rope = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        kv_BTHE = self.kv_up(latent[:, :, 0]).unflatten(-1, (self.heads, -1))
        k_nope, v = kv_BTHE.split([self.nope_dim, self.value_dim], dim=-1)
        return q, torch.cat([k_nope, k_rope.expand(-1, -1, self.heads, -1)], dim=-1), v

    def _up(self) -> tuple[Tensor, Tensor]:
        """The expansions of a latent to keys [H, N, R] and to values [H, V, R]."""
        up_HER = whole_weight(self.kv_up).unflatten(0, (self.heads, -1))
        k_up_HNR, v_up_HVR = up_HER.split([self.nope_dim, self.value_dim], dim=1)
        return k_up_HNR, v_up_HVR

    def output(self, y_BTHE: Tensor, absorbed: bool) -> Tensor:
        """Bring what the heads found, values or (absorbed) latents, to [B, T, D]."""
        if absorbed:
            y_BTHE = torch.einsum("bthr,hvr->bthv", y_BTHE, self._up()[1])
        return self.out_proj(y_BTHE.flatten(2))

    def residual_projections(self) -> tuple[nn.Linear]:
        return (self.out_proj,)

    def empty_state(self, batch: int) -> KVCache:
        """A cache whose "keys" are the latents, each with the key with position behind it, and whose "values" are
        empty: in the absorbed form a value is the beginning of its key."""
        latent, nothing = (self.kv_down.weight.new_empty(batch, 0, 1, n) for n in (self.kv_rank + self.rope_dim, 0))
        return KVCache(latent, nothing)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence in the materialised form, scores and sums over the visible pairs only."""
        layers = (self.q_down, self.q_up, self.kv_down, self.kv_up, self.out_proj)
        weights = sum(layer.weight.numel() for layer in layers if layer is not None)
        return 2 * T * weights + self.pair_flops * visibility.pairs(T)

    @property
    def pair_flops(self) -> int:
        """Forward FLOPs of the score and the sum of one (query, key) pair in all heads, in the materialised form."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def absorbed_pair_flops(self) -> int:
        """Forward FLOPs of one pair in all heads, in the absorbed form."""
        return 2 * self.heads * (2 * self.kv_rank + self.rope_dim)
