"""The state space dual form in chunks: matrix products within a chunk, one state hand-over between chunks.

With sums_i the sum of g up to token i of a chunk, u = dt x, and state that before the chunk,

    y_i = sum_{j <= i} e^{sums_i - sums_j} (C_i . B_j) u_j + e^{sums_i} state C_i

Shape letters, beside the matrices B and C: S sequences, T tokens, K chunks of L tokens; H = G groups of R heads, P
channels of a head, N numbers of a state per channel. B and C belong to a group and are never repeated for its heads:
a group's heads lie side by side as columns of one product.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels.common.arguments import is_transformed
from kernels.common.gates import LEAST_LOG_DECAY, decay

CHUNK = 64


def ssd_chunked(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return y and the final states, shapes as in `ssd`, with the log decays g = dt A [S or 1, T, H].

    Computes in the dtype of the initial states. (Products in bfloat16 would err up to seven times as much as
    the recurrence does on the same bfloat16 inputs, and save a fifth of the time.)
    """
    T, P, G, dtype = x.shape[1], x.shape[3], B.shape[2], initial_states.dtype
    if T == 1:
        return _step(x, dt, g, B, C, initial_states)
    chunk = min(chunk_size, T)
    pad = -T % chunk

    # A padding token has x = B = C = 0 and g = 0: it leaves the state as it is.
    def chunks(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
        return t.unflatten(1, (-1, chunk))

    x_SKLHP = chunks(x.to(dtype))
    B_SKGLN, C_SKGLN = (chunks(t.to(dtype)).transpose(2, 3) for t in (B, C))
    # Strong decays sum to hundreds, and float32 would lose the small differences between two sums: what it loses of
    # a sum is kept, and multiplied in where that is cheap.
    exact_SKLH = chunks(g.double().clamp(min=LEAST_LOG_DECAY)).cumsum(2)
    sums_SKLH = exact_SKLH.to(dtype)
    lost_SKLH = (exact_SKLH - sums_SKLH).detach().to(dtype)
    step_SKLH = 1.0 if dt is None else chunks(dt)

    between = _decay_between if is_transformed(x, dt, g, B, C, initial_states) else _DecayBetween.apply
    decays_SKGRLL = between(rearrange(exact_SKLH, "s k l (g r) -> s k g r l", g=G), dtype)
    scores_SKGLL = (C_SKGLN @ B_SKGLN.mT).tril()
    scores_SKHLL = (scores_SKGLL[:, :, :, None] * decays_SKGRLL).flatten(2, 3)
    u_SKLHP = x_SKLHP * (step_SKLH * (-lost_SKLH).exp())[..., None]
    inside_SKHLP = scores_SKHLL @ u_SKLHP.transpose(2, 3)

    to_end_SKLH = decay((exact_SKLH[:, :, -1:] - exact_SKLH).to(dtype))
    u_SKLHP = x_SKLHP * (step_SKLH * to_end_SKLH)[..., None]
    writes = B_SKGLN.mT @ rearrange(u_SKLHP, "s k l (g r) p -> s k g l (r p)", g=G)
    carries = rearrange(decay(sums_SKLH[:, :, -1]), "s k (g r) -> s k g 1 r 1", g=G)

    state = rearrange(initial_states, "s (g r) p n -> s g n r p", g=G)
    befores = []
    for write_SGNRP, carry in zip(writes.unflatten(-1, (-1, P)).unbind(1), carries.unbind(1), strict=True):
        befores.append(state)
        state = torch.addcmul(write_SGNRP, carry, state)
    before = torch.stack(befores, dim=1).flatten(-2)
    carried_SKLHP = rearrange(C_SKGLN @ before, "s k g l (r p) -> s k l (g r) p", p=P)
    carried_SKLHP = carried_SKLHP * decay(sums_SKLH)[..., None]
    y = torch.addcmul(carried_SKLHP, inside_SKHLP.transpose(2, 3), lost_SKLH.exp()[..., None])
    return y.flatten(1, 2)[:, :T], rearrange(state, "s g n r p -> s (g r) p n")


def _step(x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `ssd_chunked` does, of one token: the recurrence, with few tensors as large as the states."""
    G, dtype = B.shape[2], states.dtype
    x_SGRP = rearrange(x.to(dtype), "s 1 (g r) p -> s g r p", g=G)
    u_SGRP = x_SGRP if dt is None else x_SGRP * rearrange(dt, "s 1 (g r) -> s g r 1", g=G)
    B_SGN, C_SGN = (t.to(dtype).squeeze(1) for t in (B, C))
    write_SHPN = (u_SGRP[..., None] * B_SGN[:, :, None, None]).flatten(1, 2)
    carry_SH11 = g.squeeze(1).exp()[..., None, None]
    # In place, but where torch.func cannot do so for some of the tensors only.
    add = torch.addcmul if is_transformed(x, dt, g, B, C, states) else Tensor.addcmul_
    states = add(write_SHPN, states, carry_SH11)
    y_SGRP1 = states.view(len(x), G, -1, B.shape[3]) @ C_SGN[..., None]
    return y_SGRP1.reshape(x.shape), states


def _decay_between(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return e^{sums_i - sums_j} [..., L, L] of sums [..., L] in float64, for j <= i; above there is no meaning."""
    sums = exact.to(dtype)
    # Above the diagonal the difference is positive and might overflow, hence the upper bound.
    return (sums[..., :, None] - sums[..., None, :]).clamp(LEAST_LOG_DECAY, 0.0).exp_()


class _DecayBetween(torch.autograd.Function):
    """`_decay_between` with a gradient of its own.

    Autograd would hold two more matrices of this size and pass over them three times more. And here what a pair adds
    to the gradient of sums_i and takes from that of sums_j is summed in float64, so that it cancels for every g in
    both.
    """

    @staticmethod
    def forward(ctx, exact: Tensor, dtype: torch.dtype) -> Tensor:
        decays = _decay_between(exact, dtype)
        ctx.save_for_backward(decays)
        return decays

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        change = gradients[0] * ctx.saved_tensors[0]
        return change.sum(-1, dtype=torch.float64) - change.sum(-2, dtype=torch.float64), None


def ssd_flops(T: int, heads: int, groups: int, P: int, N: int, chunk_size: int = CHUNK) -> int:
    """Return the forward FLOPs of one sequence of T tokens, as `ssd` runs them: matrix products, 2mnk each.

    Scores are computed once per group; a chunk's write to the state and its reading of it, once per head. One token
    alone takes a step of the recurrence, whose only product is the reading.
    """
    if T == 1:
        return heads * 2 * P * N
    L = min(chunk_size, T)
    chunks = -(-T // L)
    return chunks * (groups * 2 * L * L * N + heads * (2 * L * L * P + 2 * (2 * L * N * P)))
