"""Attention of each query to a few keys that it names, as the indexer of DeepSeek-V3.2-Exp picks them (section 2.1).

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, D and V dimensions of keys and values,
K indices of a query.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kernels.common.arguments import without_autocast
from kernels.common.dispatch import choose_backend
from kernels.common.operation import Operation
from kernels.sparse import gathered, masked
from kernels.sparse.operators import register, sparse_attention_flops
from kernels.sparse.problems import KEPT, random_latents, random_problem
from kernels.sparse.reference import sparse_attention_reference
from kernels.sparse.rows import where_they_lie
from kernels.sparse.ways import WORTH, names_many, names_most

__all__ = ["LATENT_OPERATION", "OPERATION", "sparse_attention", "sparse_attention_flops"]

BACKENDS = ["reference", "torch", "triton"]
gathered_operator = register("sparse_attention_gathered", gathered.forward, gathered.backward)
masked_operator = register("sparse_attention_masked", masked.forward, masked.backward)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return out_th = sum_j p_thj v_{s_j} and lse_th = log sum_j e^{scale q_th.k_{s_j}} over the keys s_j that query t
    names, where p is the softmax of the scores scale q_th.k_{s_j}.

    A query reads its keys once for all heads of a group. Where v is a slice `k[..., :V]` of the keys, as in the
    absorbed form of latent attention (D 576, V 512), they are read once for both, and their gradients are summed as
    one; not so under torch.compile, which does not tell a slice from a copy.

    Args:
        q: [B, T, H, D] with H a multiple of G; head i reads key-value head i // (H / G).
        k: [B, S, G, D].
        v: [B, S, G, V], or `k[..., :V]`.
        indices: [B, T, K] int32 or int64: 0 to S - 1, or -1 for none, which may stand anywhere. A key that is named
            twice counts twice.
        scale: factor on the scores; D ** -0.5 where None.
        backend: "auto" (see `choose_backend`), "torch" (blocks of queries), "reference" (all at once) or "triton"
            (float32, bfloat16 and float16; heads of up to 256 dimensions, or 576 and 512 in the absorbed form).

    Returns:
        out [B, T, H, V] in the dtype of q, and lse [B, T, H] in float32 (float64 for float64 inputs). A query that
        names no key has out 0 and lse -inf.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, on a CPU for an index out of range (on a GPU, where
            to look would be to wait, it is none), or a backend that does not exist or that cannot run here.
        NotImplementedError: for forward-mode derivatives.
    """
    _check(q, k, v, indices)
    _refuse_forward_mode(q, k, v)
    (H, D), G, V, K = q.shape[2:], k.shape[2], v.shape[3], indices.shape[2]
    indices, scale = indices.int().contiguous(), D**-0.5 if scale is None else scale
    if K == 0 or k.shape[1] == 0:  # a key of zeros that nobody names
        indices = indices.new_full((*indices.shape[:2], 1), -1)
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    shared = is_slice(k, v)
    operation = OPERATION if not shared and names_many(q, k, indices) else FEW_OPERATION
    operation = LATENT_OPERATION if shared and G == 1 else operation
    groups = {} if operation is LATENT_OPERATION else {"kv_heads": 1}
    sizes = {"heads": H // G, "head_dim": D, "value_dim": V, "picked": min(K, 64)} | groups
    backend = choose_backend(operation, backend, BACKENDS, "torch", q, **sizes)
    backend = backend if q.numel() else "torch"  # a GPU refuses to launch no program
    with without_autocast(q):
        if backend == "reference":
            return sparse_attention_reference(q, k, v, indices, scale)
        run = masked_operator if names_most(indices, k.shape[1]) else gathered_operator
        if backend == "triton":
            from kernels.sparse.triton_operators import sparse_attention_triton as run
        return run(q.contiguous(), *where_they_lie(k, None if shared else v), indices, scale, V)


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> None:
    if any(x.dim() != n for x, n in ((q, 4), (k, 4), (v, 4), (indices, 3))) or (
        q.shape[:2] != indices.shape[:2] or k.shape != (len(q), *k.shape[1:3], q.shape[3]) or v.shape[:3] != k.shape[:3]
    ):
        raise ValueError(
            "sparse_attention takes q [B, T, H, D], k [B, S, G, D], v [B, S, G, V] and indices [B, T, K]; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, indices {tuple(indices.shape)}"
        )
    H, S, G = q.shape[2], *k.shape[1:3]
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key-value heads")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}: cast them")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64, not {indices.dtype}")
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        least, greatest = (x.item() for x in indices.aminmax())
        if least < -1 or greatest >= S:
            wrong = least if least < -1 else greatest
            raise ValueError(f"index {wrong} is no key: indices go from 0 to {S - 1}, and -1 is none")


def _refuse_forward_mode(*inputs: Tensor) -> None:
    """The operators have derivatives backward only, and would give 0 forward without a word."""
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "sparse_attention has no forward-mode derivative (torch.func.jvp): differentiate backward, with autograd"
        )


def is_slice(k: Tensor, v: Tensor) -> bool:
    """Return True where v is `k[..., :V]` in memory and, where gradients are wanted, to autograd: one step from k."""
    if torch.compiler.is_compiling() or k.is_meta or v.shape[3] > k.shape[3]:
        return False
    if v.data_ptr() != k.data_ptr() or v.stride() != k.stride() or v.requires_grad != k.requires_grad:
        return False
    if not v.requires_grad or not torch.is_grad_enabled():
        return True
    before = v.grad_fn.next_functions[0][0] if v.grad_fn is not None and v.grad_fn.next_functions else None
    return before is not None and (before is k.grad_fn or getattr(before, "variable", None) is k)


def latent_attention(
    q: Tensor, latent: Tensor, rest: Tensor, indices: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return `sparse_attention` with one head of values `latent` and of keys that are the latent and the rest side by
    side: the absorbed form as its trials and tests see it."""
    k = torch.cat([latent, rest], dim=-1)
    return sparse_attention(q, k, k[..., : latent.shape[-1]], indices, backend=backend)


@wraps(sparse_attention)
def _few_named(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """Return `sparse_attention` with so many more keys, which nobody names, that queries name few of all."""
    k, v = (F.pad(x, (0, 0, 0, 0, 0, WORTH * indices.shape[2])) for x in (k, v))
    return sparse_attention(q, k, v, indices, backend=backend)


OPERATION = Operation(sparse_attention, random_problem, KEPT)
FEW_OPERATION = Operation(_few_named, random_problem, KEPT)
LATENT_OPERATION = Operation(latent_attention, random_latents, KEPT)
