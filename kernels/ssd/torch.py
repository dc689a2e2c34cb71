"""The state space dual form in chunks: matrix products within a chunk, one state hand-over between chunks.

With s_i the sum of g up to token i of a chunk, u = dt x, and S the state before the chunk,

    y_i = sum_{j <= i} e^{s_i - s_j} (C_i . B_j) u_j + e^{s_i} S C_i

Shape letters: K chunks of L tokens; H = G groups of R heads. B and C belong to a group and are never repeated for
its heads: a group's heads lie side by side as columns of one product.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CHUNK = 64

# No decay is taken as stronger than e^-60. It would change nothing, and denormal numbers make a CPU slower by far.
LEAST = -60.0


def ssd_chunked(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`, with the log decays g = dt A [B or 1, T, H].

    Computes in the dtype of the initial states. (Products in bfloat16 would err up to seven times as much as
    the recurrence does on the same bfloat16 inputs, and save a fifth of the time.)
    """
    T, P, G, dtype = x.shape[1], x.shape[3], B.shape[2], initial_states.dtype
    chunk = min(chunk_size, T)
    pad = -T % chunk

    # A padding token has x = B = C = 0 and g = 0: it leaves the state as it is.
    def chunks(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
        return t.unflatten(1, (-1, chunk))

    x_BKLHP = chunks(x.to(dtype))
    B_BKGLN, C_BKGLN = (chunks(t.to(dtype)).transpose(2, 3) for t in (B, C))
    # Strong decays sum to hundreds, and float32 would lose the small differences between two sums: what it loses of
    # a sum is kept, and multiplied in where that is cheap.
    exact_BKLH = chunks(g.double().clamp(min=LEAST)).cumsum(2)
    sums_BKLH = exact_BKLH.to(dtype)
    lost_BKLH = (exact_BKLH - sums_BKLH).detach().to(dtype)
    step_BKLH = 1.0 if dt is None else chunks(dt)

    decay_BKGRLL = _DecayBetween.apply(rearrange(exact_BKLH, "b k l (g r) -> b k g r l", g=G), dtype)
    scores_BKGLL = (C_BKGLN @ B_BKGLN.mT).tril()
    scores_BKHLL = (scores_BKGLL[:, :, :, None] * decay_BKGRLL).flatten(2, 3)
    u_BKLHP = x_BKLHP * (step_BKLH * (-lost_BKLH).exp())[..., None]
    inside_BKHLP = scores_BKHLL @ u_BKLHP.transpose(2, 3)

    to_end_BKLH = _exp((exact_BKLH[:, :, -1:] - exact_BKLH).to(dtype))
    u_BKLHP = x_BKLHP * (step_BKLH * to_end_BKLH)[..., None]
    writes = B_BKGLN.mT @ rearrange(u_BKLHP, "b k l (g r) p -> b k g l (r p)", g=G)
    carries = rearrange(_exp(sums_BKLH[:, :, -1]), "b k (g r) -> b k g 1 r 1", g=G)

    state = rearrange(initial_states, "b (g r) p n -> b g n r p", g=G)
    before = []
    for write_BGNRP, carry in zip(writes.unflatten(-1, (-1, P)).unbind(1), carries.unbind(1)):
        before.append(state)
        state = torch.addcmul(write_BGNRP, carry, state)
    before_BKGNS = torch.stack(before, dim=1).flatten(-2)
    carried_BKLHP = rearrange(C_BKGLN @ before_BKGNS, "b k g l (r p) -> b k l (g r) p", p=P)
    carried_BKLHP = carried_BKLHP * _exp(sums_BKLH)[..., None]
    y = torch.addcmul(carried_BKLHP, inside_BKHLP.transpose(2, 3), lost_BKLH.exp()[..., None])
    return y.flatten(1, 2)[:, :T], rearrange(state, "b g n r p -> b (g r) p n")


def _exp(log_decay: Tensor) -> Tensor:
    return log_decay.clamp(min=LEAST).exp()


class _DecayBetween(torch.autograd.Function):
    """Sums s [..., L] of log decays in float64 -> e^{s_i - s_j} [..., L, L] for j <= i; above there is no meaning.

    Autograd would hold two more matrices of this size and pass over them three times more. And here what a pair adds
    to the gradient of s_i and takes from that of s_j is summed in float64, so that it cancels for every g in both.
    """

    @staticmethod
    def forward(ctx, exact: Tensor, dtype: torch.dtype) -> Tensor:
        sums = exact.to(dtype)
        # Above the diagonal the difference is positive and might overflow, hence the upper bound.
        decay = (sums[..., :, None] - sums[..., None, :]).clamp_(LEAST, 0.0).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        change = gradient * ctx.saved_tensors[0]
        return change.sum(-1, dtype=torch.float64) - change.sum(-2, dtype=torch.float64), None


def ssd_flops(T: int, heads: int, groups: int, P: int, N: int, chunk_size: int = CHUNK) -> int:
    """Forward FLOPs of one sequence of T tokens, as `ssd` runs them: matrix products, 2mnk each.

    Scores are computed once a group; a chunk's write to the state and its reading of it, once a head. One token
    alone takes a step of the recurrence, whose only product is the reading.
    """
    if T == 1:
        return heads * 2 * P * N
    L = min(chunk_size, T)
    chunks = -(-T // L)
    return chunks * (groups * 2 * L * L * N + heads * (2 * L * L * P + 2 * (2 * L * N * P)))
