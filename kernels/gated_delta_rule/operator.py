"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.gated_delta_rule import triton as kernels
from kernels.gated_delta_rule.torch import gated_delta_rule_flops
from kernels.gated_delta_rule.triton import PART
from kernels.sequences import chunks_of, takes_steps

# Columns of V that a program holds, its warps in the forward and in the backward pass, and the pipeline stages of the kernels
# that go through a sequence, by the least compute capability that they are for and the largest K. To add a GPU, add its rows:
# the tests compile every row for every architecture and check that its shared memory suffices.
BLOCKS = {
    (8, 0): {64: (32, 4, 4, 2), 128: (32, 4, 8, 2), 256: (16, 8, 8, 1)},
    (9, 0): {64: (64, 4, 4, 2), 128: (32, 4, 8, 2), 256: (16, 8, 8, 1)},
    # Triton 3.7 fails on these kernels in the tensor memory of Blackwell, which two warps do not use.
    (10, 0): {64: (32, 2, 2, 1), 128: (16, 2, 2, 1), 256: (16, 8, 8, 1)},
}


def blocks_for(K: int, V: int, capability: tuple[int, int], backward: bool) -> tuple[int, int, int, int]:
    """(BK, BV, warps, stages) for heads of K and V dimensions.

    Raises:
        ValueError: for K or V above 256.
    """
    if max(K, V) > 256:
        raise ValueError(f"heads of {K} and {V} dimensions: the Triton kernels take up to 256; choose backend='torch'")
    table = BLOCKS[max(c for c in BLOCKS if c <= max(capability, min(BLOCKS)))]
    BV, *warps, stages = table[min(size for size in table if size >= K)]
    return max(16, _power_of_two(K)), min(BV, max(16, _power_of_two(V))), warps[backward], stages


def chunk_for(K: int, V: int) -> int:
    """Tokens in a chunk: heads above 128 dimensions leave shared memory for half as many."""
    return 64 if max(K, V) <= 128 else 32


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Launch:
    """Sizes and launchers of one call, for tensors [tokens, heads, D] that hold the packed sequences."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor, backward: bool = False):
        (self.tokens, self.H, self.K), (self.HV, self.V) = q.shape, v.shape[1:]
        self.C = chunk_for(self.K, self.V)
        self.begins, self.ends, _, self.firsts = chunks_of(cu_seqlens, self.tokens, self.C)
        self.chunks, self.sequences = len(self.begins), len(cu_seqlens) - 1
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        self.BK, self.BV, self.warps, self.stages = blocks_for(self.K, self.V, capability, backward)
        self.precision = "tf32x3" if v.dtype == torch.float32 else "tf32"

    def per_chunk(self, kernel, *arguments, V: bool = True) -> None:
        sizes = {"V": self.V, "BV": self.BV} if V else {}
        kernel[(self.chunks, self.HV)](
            *arguments, self.HV, self.H, K=self.K, BK=self.BK, C=self.C, PRECISION=self.precision, **sizes,
            num_warps=self.warps, num_stages=1,
        )  # fmt: skip

    def per_sequence(self, kernel, *arguments) -> None:
        kernel[(-(-self.V // self.BV), self.HV, self.sequences)](
            *arguments, self.HV, self.H, K=self.K, V=self.V, BK=self.BK, BV=self.BV, C=self.C,
            PRECISION=self.precision, num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip

    def states(self, like: Tensor, n: int) -> Tensor:
        return torch.empty(n, self.HV, self.K, self.V, dtype=torch.float32, device=like.device)


def _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale):
    run = Launch(q, v, cu_seqlens)
    A = torch.empty(run.chunks, run.HV, run.C, run.C, dtype=torch.float32, device=q.device)
    w = torch.empty(run.tokens, run.HV, run.K, dtype=torch.float32, device=q.device)
    new = torch.empty(run.tokens, run.HV, run.V, dtype=torch.float32, device=q.device)
    states, final, o = run.states(q, run.chunks), run.states(q, run.sequences), torch.empty_like(v)
    run.per_chunk(kernels.scores_kernel, k, g, beta, A, run.begins, run.ends, V=False)
    kernels.invert_kernel[(run.chunks, run.HV)](A, run.HV, P=PART, C=run.C, num_warps=1)
    run.per_chunk(kernels.writes_kernel, k, v, g, beta, A, new, w, run.begins, run.ends)
    run.per_sequence(
        kernels.states_kernel, k, g, new, w, states, initial_state, final, run.begins, run.ends, run.firsts
    )
    run.per_chunk(kernels.outputs_kernel, q, k, g, new, states, o, run.begins, run.ends, scale)
    return o, final, A, w, new, states


@torch.library.custom_op("archipelago::gated_delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k [tokens, H, K], v [tokens, HV, V], g, beta [tokens, HV], initial_state [sequences, HV, K, V] -> o, the final
    states, and what the backward pass needs: T, w, v' and the state before each chunk."""
    with torch.cuda.device_of(q):
        return _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale)


@forward.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale):
    (tokens, _, K), (HV, V) = q.shape, v.shape[1:]
    C = chunk_for(K, V)
    chunks = tokens // C + len(cu_seqlens) - 1
    shapes = ((chunks, HV, C, C), (tokens, HV, K), (tokens, HV, V), (chunks, HV, K, V))
    saved = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return torch.empty_like(v), torch.empty_like(initial_state, dtype=torch.float32), *saved


@torch.library.custom_op("archipelago::gated_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, A: Tensor, w: Tensor, new: Tensor,
    states: Tensor, do: Tensor, dfinal: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, beta and the initial states; all in float32 but dv, in v's dtype."""
    run = Launch(q, v, cu_seqlens, backward=True)
    dnew, dw = torch.empty_like(new), torch.empty_like(w)
    dq, dk = (torch.empty_like(w) for _ in range(2))
    dv, dinitial = torch.empty_like(v), run.states(q, run.sequences)
    dg, dbeta = (torch.empty(g.shape, dtype=torch.float32, device=g.device) for _ in range(2))
    dstates = torch.empty_like(states)
    where = run.begins, run.ends
    run.per_chunk(kernels.inside_gradients_kernel, q, k, g, do, dnew, *where, scale)
    run.per_sequence(
        kernels.state_gradients_kernel, q, k, g, w, do, dnew, dstates, dinitial, dfinal, *where, run.firsts, scale
    )
    run.per_chunk(
        kernels.output_gradients_kernel, q, k, g, new, states, dstates, do, dnew, dq, dk, dw, dg, *where, scale
    )
    run.per_chunk(kernels.write_gradients_kernel, k, v, g, beta, A, w, dw, dnew, dk, dv, dg, dbeta, *where)
    dq, dk = (x.unflatten(1, (run.H, -1)).sum(2) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


@backward.register_fake
def _(q, k, v, g, beta, cu_seqlens, A, w, new, states, do, dfinal, scale):
    single = (torch.empty_like(x, dtype=torch.float32) for x in (q, k))
    gates = (torch.empty_like(x, dtype=torch.float32) for x in (g, beta))
    return *single, torch.empty_like(v), *gates, torch.empty_like(dfinal)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])


def _differentiate(ctx, do, dfinal, *unused):
    q, k, v, g, beta, initial_state, cu_seqlens, A, w, new, states = ctx.saved_tensors
    gradients = backward(
        q, k, v, g, beta, cu_seqlens, A, w, new, states, do.contiguous(), dfinal.contiguous(), ctx.scale
    )
    inputs = (q, k, v, g, beta, initial_state)
    return *(d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """As if all tokens were one sequence; sequences of other lengths have other last chunks."""
    return gated_delta_rule_flops(q_shape[0], v_shape[1], q_shape[2], v_shape[2])


@torch.library.custom_op("archipelago::gated_delta_rule_steps", mutates_args=())
def steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`, token by token, without gradients -> o and the final state."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    o, final, BV = torch.empty_like(v), torch.empty_like(initial_state), min(16, _power_of_two(V))
    sizes = {"K": K, "V": V, "BK": _power_of_two(K), "BV": BV}
    with torch.cuda.device_of(q):
        kernels.steps_kernel[(-(-V // BV), HV, B)](
            q, k, v, g, beta, initial_state, o, final, T, HV, H, scale, **sizes, num_warps=1
        )
    return o, final


@steps.register_fake
def _(q, k, v, g, beta, initial_state, scale):
    return torch.empty_like(v), torch.empty_like(initial_state)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule_steps)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return q_shape[0] * q_shape[1] * gated_delta_rule_flops(1, v_shape[2], q_shape[3], v_shape[3])


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `gated_delta_rule`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or heads above 256 dimensions.
    """
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton kernels take float32, bfloat16 and float16, not {v.dtype}: choose backend='torch'"
        )
    if takes_steps(q.shape[1], cu_seqlens, (q, k, v, g, beta, initial_state)):
        return steps(*(x.contiguous() for x in (q, k, v, g, beta, initial_state)), scale)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(len(q) + 1, device=q.device) * q.shape[1]
    packed = (x.flatten(0, 1).contiguous() for x in (q, k, v, g, beta))
    o, final, *_ = forward(*packed, initial_state.contiguous(), cu_seqlens, scale)
    return o.view(v.shape), final
