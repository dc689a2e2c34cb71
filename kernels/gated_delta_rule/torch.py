"""The gated delta rule in chunks: matrix products within a chunk, one state hand-over between chunks.

With G_i the sum of g up to token i of a chunk and S the state before the chunk, the writes u_i of the chunk
solve a unit lower triangular system (the WY form of Yang et al., arXiv 2406.06484, with decay, 2412.06464):

    (I + A) U = diag(beta) (V - diag(e^G) K S),    A_ij = beta_i e^{G_i - G_j} k_i.k_j  for j < i
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CHUNK = 64


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`; computes in float32, or float64 for float64 inputs."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunk = min(CHUNK, T)
    # A padding token has k = 0, beta = 0 and g = 0: it leaves the state as it is.
    pad = -T % chunk

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, pad))
        return rearrange(x, "b (n c) h ... -> b h n c ...", c=chunk)

    q_BHNCK, k_BHNCK, v_BHNCV, g_BHNC, beta_BHNC = map(chunks, (q, k, v, g, beta))
    if HV != H:
        q_BHNCK, k_BHNCK = (x.repeat_interleave(HV // H, dim=1) for x in (q_BHNCK, k_BHNCK))

    # Autocast would run these in bfloat16, where the triangular system loses the small writes.
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        # Strong gates sum to hundreds, and float32 would lose the small differences between two sums.
        G_BHNC = g_BHNC.double().cumsum(-1)
        causal_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        # Mask before exp: above the diagonal G_i - G_j is positive and may overflow.
        between_BHNCC = (G_BHNC[..., :, None] - G_BHNC[..., None, :]).to(dtype)
        decay_BHNCC = between_BHNCC.masked_fill(~causal_CC, -torch.inf).exp()
        to_end_BHNC = (G_BHNC[..., -1:] - G_BHNC).to(dtype)
        G_BHNC = G_BHNC.to(dtype)
        k_beta_BHNCK = k_BHNCK * beta_BHNC[..., None]
        A_BHNCC = (k_beta_BHNCK @ k_BHNCK.mT) * decay_BHNCC
        rhs = torch.cat([v_BHNCV * beta_BHNC[..., None], k_beta_BHNCK * G_BHNC.exp()[..., None]], dim=-1)
        # Only the part below the diagonal is read; unitriangular puts the ones of I + A on it.
        solved = torch.linalg.solve_triangular(A_BHNCC, rhs, upper=False, unitriangular=True)
        u_BHNCV, w_BHNCK = solved.split([V, K], dim=-1)

        scores_BHNCC = (q_BHNCK @ k_BHNCK.mT) * (decay_BHNCC * scale)
        q_in_BHNCK = q_BHNCK * (G_BHNC.exp() * scale)[..., None]
        k_out_BHNCK = k_BHNCK * to_end_BHNC.exp()[..., None]
        carry_BHN = G_BHNC[..., -1].exp()

        state = q.new_zeros(B, HV, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        outputs = []
        for n in range(G_BHNC.shape[2]):
            write_BHCV = u_BHNCV[:, :, n] - w_BHNCK[:, :, n] @ state
            outputs.append(q_in_BHNCK[:, :, n] @ state + scores_BHNCC[:, :, n] @ write_BHCV)
            state = carry_BHN[:, :, n, None, None] * state + k_out_BHNCK[:, :, n].mT @ write_BHCV
    o_BTHV = rearrange(torch.stack(outputs, dim=2), "b h n c v -> b (n c) h v")[:, :T]
    return o_BTHV.to(v.dtype), state


def gated_delta_rule_flops(T: int, value_heads: int, K: int, V: int) -> int:
    """Forward FLOPs of one sequence of T tokens, as `gated_delta_rule_chunked` runs them.

    Matrix products count 2mnk; the triangular solve of C rows counts C^2 for each right-hand column. Key heads
    are repeated to value heads before the products, so they count once for every value head.
    """
    C = min(CHUNK, T)
    chunks = -(-T // C)
    inside = 2 * (2 * C * C * K) + C * C * (K + V) + 2 * C * C * V
    state = 3 * (2 * C * K * V)
    return value_heads * chunks * (inside + state)
