"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode."""

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.sequences import chunks_of, takes_steps
from kernels.ssd import triton as kernels
from kernels.ssd.torch import CHUNK, ssd_flops

# Rows and columns of a state that a product takes, warps and pipeline stages, by the least compute capability that they are
# for. To add a GPU, add its row: the tests compile every row for every architecture and check that its shared memory
# suffices.
BLOCKS = {(8, 0): (64, 32, 4, 1), (9, 0): (64, 64, 8, 1), (10, 0): (64, 64, 8, 1)}
PASSED = 1024  # numbers of a state that one program hands from chunk to chunk


def blocks_for(P: int, N: int, capability: tuple[int, int]) -> tuple[int, int, int, int]:
    """(BP, BN, warps, stages) for heads of P channels with N numbers each."""
    BP, BN, warps, stages = BLOCKS[max(c for c in BLOCKS if c <= max(capability, min(BLOCKS)))]
    return min(BP, max(16, triton.next_power_of_2(P))), min(BN, max(16, triton.next_power_of_2(N))), warps, stages


class Launch:
    """Sizes and launchers of one call, for tensors [tokens, heads, D] that hold the packed sequences."""

    def __init__(self, x: Tensor, B: Tensor, cu_seqlens: Tensor):
        (self.tokens, self.H, self.P), (self.G, self.N) = x.shape, B.shape[1:]
        self.begins, self.ends, _, self.firsts = chunks_of(cu_seqlens, self.tokens, CHUNK)
        self.chunks, self.sequences = len(self.begins), len(cu_seqlens) - 1
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
        self.BP, self.BN, self.warps, self.stages = blocks_for(self.P, self.N, capability)
        self.precision = "tf32x3" if x.dtype == torch.float32 else "tf32"

    def per_chunk(self, kernel, *arguments, **constants) -> None:
        kernel[(self.chunks, self.H)](
            *arguments, self.begins, self.ends, self.H, self.G, P=self.P, N=self.N, BP=self.BP, BN=self.BN, L=CHUNK,
            PRECISION=self.precision, num_warps=self.warps, num_stages=self.stages, **constants,
        )  # fmt: skip

    def hand_over(self, g: Tensor, states: Tensor, first: Tensor, last: Tensor, reverse: bool) -> None:
        size = self.P * self.N
        kernels.pass_kernel[(-(-size // PASSED), self.H, self.sequences)](
            g, states, first, last, self.begins, self.ends, self.firsts, self.H, SIZE=size, BLOCK=PASSED, L=CHUNK,
            REVERSE=reverse,
        )  # fmt: skip

    def states(self, like: Tensor) -> Tensor:
        return torch.empty(self.chunks, self.H, self.P, self.N, dtype=torch.float32, device=like.device)


@torch.library.custom_op("archipelago::ssd", mutates_args=())
def forward(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, cu_seqlens: Tensor, single: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, H, P], dt, g [tokens, H], B, C [tokens, G, N], initial_states [sequences, H, P, N] -> y (in float32 if
    `single`, else in x's dtype), the final states, and the state before each chunk."""
    run = Launch(x, B, cu_seqlens)
    y = torch.empty_like(x, dtype=torch.float32 if single else x.dtype)
    final, states = torch.empty_like(initial_states), run.states(x)
    with torch.cuda.device_of(x):
        run.per_chunk(kernels.outer_kernel, x, B, dt, g, states, READ=False)
        run.hand_over(g, states, initial_states, final, reverse=False)
        run.per_chunk(kernels.outputs_kernel, x, dt, g, B, C, states, y)
    return y, final, states


@forward.register_fake
def _(x, dt, g, B, C, initial_states, cu_seqlens, single):
    chunks = x.shape[0] // CHUNK + len(cu_seqlens) - 1
    states = initial_states.new_empty(chunks, *initial_states.shape[1:])
    y = torch.empty_like(x, dtype=torch.float32 if single else x.dtype)
    return y, torch.empty_like(initial_states), states


@torch.library.custom_op("archipelago::ssd_backward", mutates_args=())
def backward(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor, states: Tensor, dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, g, B, C and the initial states; all in float32 but dx, in x's dtype."""
    run = Launch(x, B, cu_seqlens)
    dstates, dinitial, dx = run.states(x), torch.empty_like(dfinal), torch.empty_like(x)
    ddt, dg = (torch.empty(g.shape, dtype=torch.float32, device=g.device) for _ in range(2))
    dB, dC = (torch.empty(*g.shape, run.N, dtype=torch.float32, device=g.device) for _ in range(2))
    run.per_chunk(kernels.outer_kernel, dy, C, dt, g, dstates, READ=True)
    run.hand_over(g, dstates, dfinal, dinitial, reverse=True)
    run.per_chunk(kernels.values_gradient_kernel, x, dt, g, B, C, dstates, dy, dx, ddt)
    run.per_chunk(kernels.keys_gradient_kernel, x, dt, g, B, C, states, dstates, dy, dg, dB, dC)
    dB, dC = (d.unflatten(1, (run.G, -1)).sum(2) for d in (dB, dC))
    return dx, ddt, dg, dB, dC, dinitial


@backward.register_fake
def _(x, dt, g, B, C, cu_seqlens, states, dy, dfinal):
    gates = (torch.empty_like(t, dtype=torch.float32) for t in (dt, g, B, C))
    return torch.empty_like(x), *gates, torch.empty_like(dfinal)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])


def _differentiate(ctx, dy, dfinal, _):
    x, dt, g, B, C, initial_states, cu_seqlens, states = ctx.saved_tensors
    gradients = backward(x, dt, g, B, C, cu_seqlens, states, dy.contiguous(), dfinal.contiguous())
    inputs = (x, dt, g, B, C, initial_states)
    return *(d.to(t.dtype) for d, t in zip(gradients, inputs, strict=True)), None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.ssd)
def _(x_shape, dt_shape, g_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """As if all tokens were one sequence; sequences of other lengths have other last chunks."""
    return ssd_flops(*x_shape[:2], B_shape[1], x_shape[2], B_shape[2])


@torch.library.custom_op("archipelago::ssd_steps", mutates_args=())
def steps(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, single: bool
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`, token by token, without gradients -> y and the final states."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    y, final = torch.empty_like(x, dtype=torch.float32 if single else x.dtype), torch.empty_like(initial_states)
    BP = min(16, triton.next_power_of_2(P))
    sizes = {"P": P, "N": N, "BP": BP, "BN": triton.next_power_of_2(N)}
    with torch.cuda.device_of(x):
        kernels.steps_kernel[(-(-P // BP), H, batch)](
            x, dt, g, B, C, initial_states, y, final, T, H, G, **sizes, num_warps=1
        )
    return y, final


@steps.register_fake
def _(x, dt, g, B, C, initial_states, single):
    return torch.empty_like(x, dtype=torch.float32 if single else x.dtype), torch.empty_like(initial_states)


@register_flop_formula(torch.ops.archipelago.ssd_steps)
def _(x_shape, dt_shape, g_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    batch, T, H, P = x_shape
    return batch * T * ssd_flops(1, H, B_shape[2], P, B_shape[3])


def ssd_triton(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, cu_seqlens: Tensor | None,
    single: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `ssd`, with the log decays g = dt A [B or 1, T, H]; y in float32 if `single`, else in x's dtype.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton kernels take float32, bfloat16 and float16, not {x.dtype}: choose backend='torch'"
        )
    batch, T, H, _ = x.shape
    g = g.expand(batch, T, H)
    dt = torch.ones_like(g) if dt is None else dt
    if takes_steps(T, cu_seqlens, (x, dt, g, B, C, initial_states)):
        return steps(*(t.contiguous() for t in (x, dt, g, B, C, initial_states)), single)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device) * T
    packed = (t.flatten(0, 1).contiguous() for t in (x, dt, g, B, C))
    y, final_states, _ = forward(*packed, initial_states.contiguous(), cu_seqlens, single)
    return y.view(x.shape), final_states
