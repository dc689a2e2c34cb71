"""The gated delta rule in chunks of C tokens, forward and backward: matrix products within a chunk, one state hand-over
between chunks.

With G the sum of g within a chunk, S the state before it, decays_ij = e^{G_i - G_j} for i >= j, and
A = beta_i decays_ij k_i.k_j below the diagonal (the WY form of Yang et al., arXiv 2406.06484, with decay, 2412.06464),

    inverse = (I + A)^-1    u = inverse (beta v)    w = inverse (beta e^G k)    v' = u - w S
    scores = scale (q k^T * decays)    o = scale e^G q S + scores v'    S_next = e^{G_last} S + (e^{G_last - G} k)^T v'

Only v' and S go through the chunks one by one. The gradients are written out: autograd would hold twice the matrices
and take twice the time.

Shape letters: M = N chunks x B sequences x HV value heads, in this order, so that the heads of one chunk lie
together; T tokens of a sequence, C of a chunk; H key heads; K and V dimensions of keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import without_autocast
from kernels.common.gates import LEAST_LOG_DECAY, decay

CHUNK = 64
PART = 8  # rows of the blocks on the diagonal that are inverted row by row


def _chunk_for(T: int) -> int:
    return min(CHUNK, -(-T // PART) * PART)


def _chunked(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """Turn [B, T, HV, ...] into [M, C, ...] in its own memory. A padding token has k = 0, beta = 0 and g = 0: it
    changes nothing."""
    if pad := -x.shape[1] % C:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    chunks = x.unflatten(1, (-1, C)).movedim(0, 1).transpose(2, 3)
    return chunks.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 2)


def _joined(x: Tensor, B: int, T: int, HV: int) -> Tensor:
    """Turn [M, C, ...] into [B, T, HV, ...]."""
    return x.view(-1, B, HV, *x.shape[1:]).transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :T].contiguous()


def _decays(G_MC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return e^G and e^{G_last - G}, both [M, C], of sums G in float64."""
    return decay(G_MC.to(dtype)), decay((G_MC[:, -1:] - G_MC).to(dtype))


def _decay_between(G_MC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return decays [M, C, C], 0 above the diagonal. Strong gates sum to hundreds, of which float32 would lose the
    small differences: what it loses of each sum is taken along."""
    high = G_MC.to(dtype)
    lost = (G_MC - high).to(dtype)
    between = (high[:, :, None] - high[:, None]).add_(lost[:, :, None]).sub_(lost[:, None])
    return between.clamp_(LEAST_LOG_DECAY, 0.0).exp_().tril_()


def unit_triangular_inverse(A: Tensor) -> Tensor:
    """Return (I + A)^-1 of strictly lower triangular A [M, C, C] with C a multiple of PART: the blocks on the
    diagonal row by row, those below from the ones above them. Stable whatever the size of its entries, which powers
    of A are not."""
    M, C, _ = A.shape
    blocks = (C // PART, PART)
    on_diagonal = lambda x: x.unflatten(1, blocks).unflatten(3, blocks).diagonal(dim1=1, dim2=3)  # noqa: E731
    a = on_diagonal(A).permute(1, 2, 0, 3).contiguous()
    inverse = torch.zeros_like(a)
    inverse.diagonal(dim1=0, dim2=1).fill_(1)
    for i in range(1, PART):
        inverse[i, :i] = -(a[i, :i, None] * inverse[:i, :i]).sum(0)
    whole = torch.zeros_like(A)
    on_diagonal(whole).copy_(inverse.permute(2, 0, 1, 3))
    for r in range(PART, C, PART):
        rows = slice(r, r + PART)
        whole[:, rows, :r] = -(whole[:, rows, rows] @ (A[:, rows, :r] @ whole[:, :r, :r]))
    return whole


def _inputs(q, k, v, g, beta, dtype: torch.dtype):
    """Return the inputs of the operators, in chunks and in `dtype`, and G in float64."""
    C, groups = _chunk_for(q.shape[1]), v.shape[2] // q.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    return *(_chunked(x, C, dtype) for x in (q, k, v, beta)), _chunked(g, C, torch.float64).cumsum(-1)


def chunked_forward(
    q, k, v, g, beta, initial_state, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return o, the final state, and what the backward pass needs: decays, decays * k k^T, inverse, scores, u beside
    w, v' and the state before each chunk. Shapes as in `gated_delta_rule`; computes in the dtype of the initial
    state."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    dtype = initial_state.dtype
    q_MCK, k_MCK, v_MCV, beta_MC, G_MC = _inputs(q, k, v, g, beta, dtype)
    growth_MC, to_end_MC = _decays(G_MC, dtype)
    decays = _decay_between(G_MC, dtype)
    kk = (k_MCK @ k_MCK.mT).mul_(decays).tril_(-1)
    inverse = unit_triangular_inverse(kk * beta_MC[..., None])
    scores = (q_MCK @ k_MCK.mT).mul_(decays).mul_(scale)

    writes = k_MCK.new_empty(*beta_MC.shape, V + K)
    torch.mul(v_MCV, beta_MC[..., None], out=writes[..., :V])
    torch.mul(k_MCK, (beta_MC * growth_MC)[..., None], out=writes[..., V:])
    uw = inverse @ writes
    u_MCV, w_MCK = uw.split([V, K], dim=-1)
    new, k_out = torch.empty_like(v_MCV), k_MCK * to_end_MC[..., None]
    states = k_MCK.new_empty(len(k_MCK) // (B * HV) + 1, B * HV, K, V)
    states[0] = initial_state.flatten(0, 1)
    carry = growth_MC[:, -1].view(-1, B * HV, 1, 1)
    for n in range(len(carry)):
        chunk = slice(n * B * HV, (n + 1) * B * HV)
        torch.baddbmm(u_MCV[chunk], w_MCK[chunk], states[n], alpha=-1, out=new[chunk])
        torch.mul(states[n], carry[n], out=states[n + 1]).baddbmm_(k_out[chunk].mT, new[chunk])
    o = (q_MCK @ states[:-1].flatten(0, 1)).mul_((growth_MC * scale)[..., None]).baddbmm_(scores, new)
    o, final_state = _joined(o, B, T, HV).to(v.dtype), states[-1].view(B, HV, K, V).clone()
    return o, final_state, decays, kk, inverse, scores, uw, new, states


def _state_gradients(q_in, k_out, w, carry, do, dnew, dfinal) -> Tensor:
    """Go backwards through the chunks: return the gradient of the state after each [N + 1, B HV, K, V], and complete
    that of v' in place."""
    N, heads = carry.shape[:2]
    dstates = dfinal.new_empty(N + 1, heads, w.shape[-1], do.shape[-1], dtype=do.dtype)
    dstates[N] = dfinal.flatten(0, 1)
    for n in reversed(range(N)):
        chunk = slice(n * heads, (n + 1) * heads)
        dnew[chunk].baddbmm_(k_out[chunk], dstates[n + 1])
        before = torch.mul(dstates[n + 1], carry[n], out=dstates[n])
        before.baddbmm_(q_in[chunk].mT, do[chunk]).baddbmm_(w[chunk].mT, dnew[chunk], alpha=-1)
    return dstates


def chunked_backward(
    q, k, v, g, beta, decays, kk, inverse, scores, uw, new, states, do, dfinal, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g, beta and the initial state, in the dtype of the states."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    dtype = states.dtype
    q_MCK, k_MCK, v_MCV, beta_MC, G_MC = _inputs(q, k, v, g, beta, dtype)
    growth_MC, to_end_MC = _decays(G_MC, dtype)
    growth, to_end = growth_MC[..., None], to_end_MC[..., None]
    do_MCV = _chunked(do, scores.shape[1], dtype)

    carry = growth_MC[:, -1].view(-1, B * HV, 1, 1)
    dnew = scores.mT @ do_MCV
    dstates = _state_gradients(q_MCK * (growth * scale), k_MCK * to_end, uw[..., V:], carry, do_MCV, dnew, dfinal)
    before, dafter = states[:-1].flatten(0, 1), dstates[1:].flatten(0, 1)

    dq = (do_MCV @ before.mT).mul_(growth * scale)
    dk = (new @ dafter.mT).mul_(to_end)
    # Of a gate g_t: what acts through e^G comes from the tokens from t on, what acts through e^{G_last - G} from
    # those before t, and what acts through decays_ij from the pairs j < t <= i. Summed like this nothing has to
    # cancel.
    from_start, to_last = (q_MCK * dq).sum(-1), (k_MCK * dk).sum(-1)
    whole = (before * dafter).sum((1, 2)).mul_(growth_MC[:, -1])
    dscores = do_MCV @ new.mT
    pairs = dscores * scores
    dscores.mul_(decays).mul_(scale)
    dq.baddbmm_(dscores, k_MCK)
    dk.baddbmm_(dscores.mT, q_MCK)
    del dscores, do_MCV, q_MCK

    dwrites = inverse.mT @ torch.cat([dnew, (dnew @ before.mT).neg_()], dim=-1)
    dv_beta, dk_beta = dwrites.split([V, K], dim=-1)
    through_w = (k_MCK * dk_beta).sum(-1).mul_(growth_MC)
    from_start.addcmul_(beta_MC, through_w)
    # d(inverse) = -inverse dA inverse
    dA = (dwrites @ uw.mT).neg_()
    through_kk = dA * kk
    dbeta = (v_MCV * dv_beta).sum(-1).add_(through_w).add_(through_kk.sum(-1))
    pairs.addcmul_(through_kk, beta_MC[..., None])
    dkk = dA.mul_(decays).mul_(beta_MC[..., None]).tril_(-1)
    dk.addcmul_(dk_beta, beta_MC[..., None] * growth).baddbmm_(dkk + dkk.mT, k_MCK)
    dv = dv_beta * beta_MC[..., None]
    earlier = torch.ones_like(scores[0]).triu_(1)
    spanning = (pairs.flatten(0, 1) @ earlier).view_as(pairs).tril_().sum(1)
    dg = from_start.flip(1).cumsum(1).flip(1) + F.pad(to_last[:, :-1].cumsum(1), (1, 0)) + whole[:, None] + spanning

    dq, dk, dv, dg, dbeta = (_joined(x, B, T, HV) for x in (dq, dk, dv, dg, dbeta))
    dq, dk = (x.unflatten(2, (H, -1)).sum(3) if HV != H else x for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dstates[0].view(B, HV, K, V).clone()


@torch.library.custom_op("archipelago::gated_delta_rule_chunked", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return chunked_forward(q, k, v, g, beta, initial_state, scale)


@torch.library.custom_op("archipelago::gated_delta_rule_chunked_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, decays: Tensor, kk: Tensor, inverse: Tensor,
    scores: Tensor, uw: Tensor, new: Tensor, states: Tensor, do: Tensor, dfinal: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with without_autocast(q):
        return chunked_backward(q, k, v, g, beta, decays, kk, inverse, scores, uw, new, states, do, dfinal, scale)


@forward.register_fake
def _(q, k, v, g, beta, initial_state, scale):
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    C = _chunk_for(T)
    N = -(-T // C)
    M = N * B * HV
    shapes = *((M, C, C),) * 4, (M, C, V + K), (M, C, V), (N + 1, B * HV, K, V)
    return v.new_empty(v.shape), torch.empty_like(initial_state), *(initial_state.new_empty(s) for s in shapes)


@backward.register_fake
def _(q, k, v, g, beta, decays, kk, inverse, scores, uw, new, states, do, dfinal, scale):
    return *(states.new_empty(x.shape) for x in (q, k, v, g, beta)), states.new_empty(dfinal.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, do, dfinal, *unused):
    *inputs, initial_state = ctx.saved_tensors[:6]
    gradients = backward(*inputs, *ctx.saved_tensors[6:], do, dfinal, ctx.scale)
    return *(d.to(x.dtype) for d, x in zip(gradients, (*inputs, initial_state), strict=True)), None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule_chunked)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    (B, T, _, K), (HV, V) = q_shape, v_shape[2:]
    return B * gated_delta_rule_flops(T, HV, K, V)


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, shapes as in `gated_delta_rule`; computes in the dtype of the initial state."""
    o, final_state, *_ = forward(q, k, v, g, beta, initial_state, scale)
    return o, final_state


def gated_delta_rule_flops(T: int, value_heads: int, K: int, V: int) -> int:
    """Return the forward FLOPs of one sequence of T tokens.

    Matrix products count 2mnk; the triangular system of C rows counts C^2 for each column of u and w, however it is
    solved. Key heads are repeated to value heads before the products, so they count once for every value head. One
    token alone takes a step of the recurrence.
    """
    if T == 1:
        return value_heads * 2 * (2 * K * V)
    C = min(CHUNK, T)
    chunks = -(-T // C)
    inside = 2 * (2 * C * C * K) + C * C * (K + V) + 2 * C * C * V
    state = 3 * (2 * C * K * V)
    return value_heads * chunks * (inside + state)
