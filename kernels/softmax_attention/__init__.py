"""Softmax attention over the keys that each query sees, by one function that says which path it took.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, D key dimensions, E value dimensions,
R runs of keys.
"""

import torch
from torch import Tensor

from kernels.common.arguments import check_shape, check_tensors, is_transformed, without_autocast
from kernels.common.dispatch import refuse_transforms, say
from kernels.softmax_attention.block_rows import KEPT_BYTES, attention_flops, forward, kept_numbers
from kernels.softmax_attention.fused import attention_flex, attention_sdpa
from kernels.softmax_attention.largest import largest_scores
from kernels.softmax_attention.pairs import Pairs
from kernels.softmax_attention.reference import attention_reference

__all__ = ["attention", "attention_flops", "largest_scores"]

BACKENDS = {"reference": attention_reference, "sdpa": attention_sdpa, "flex": attention_flex}
SMALL = 2**18  # pairs, of which a table may be made
SHORT = 512  # tokens, up to which rows were faster than PyTorch's attention in bfloat16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    runs: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    places: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return o_t = sum_s p_ts v_s over the keys s that query t sees, p = softmax(scale q_t . k_s - slope |t - s|).

    The queries are the last T of the S tokens, as they are in decoding. Under autocast it computes in its dtype.

    Args:
        q: [B, T, H, D]; k: [B, S, G, D]; v: [B, S, G, E]; query head h reads key-value head h // (H / G).
        causal: whether a query sees its own token and those before it alone.
        window: tokens that a query sees in each direction that it sees at all, its own included; None for all.
        runs: in place of causal and window begins and ends, int64 [R, B or 1, T] both: query t sees the keys from begin
            to end - 1 of each run. They do not overlap, and one is not empty: packed documents, blocks.
        scale: factor on the scores, above 0; D ** -0.5 where None.
        sinks: [H], scores that take part in the softmax and carry no value; or None.
        slopes: [H], what is taken from a score per token of distance; or None.
        places: [S], where tokens are for that distance; one after the other where None. Without slopes it is not read.
        backend: "auto" (see `choose_path`), "rows" (blocks of queries, on a CPU), "sdpa" (PyTorch's
            scaled_dot_product_attention; with a mask of [T, S] but for all pairs and plain causal attention), "flex"
            (FlexAttention; on a CPU for tests) or "reference".

    Returns:
        o [B, T, H, E] in q's dtype.

    Raises:
        ValueError: for tensors, shapes or an extent that do not fit together (see `check_tensors`), or a backend that
            does not exist or cannot run here.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    check_tensors(
        "attention", q=(q, "B T H D"), k=(k, "B S G D"), v=(v, "B S G E"), sinks=(sinks, "H"), slopes=(slopes, "H")
    )
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    if k.shape != (B, S, G, D) or v.shape[:3] != (B, S, G) or not G or H % G or T > S:
        raise ValueError(
            "attention takes q [B, T, H, D], k [B, S, G, D] and v [B, S, G, E] with H a multiple of G and T at most S; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v of attention are {q.dtype}, {k.dtype} and {v.dtype}: give them one dtype")
    check_shape("sinks", sinks, (H,))
    check_shape("slopes", slopes, (H,))
    if window is not None and window < 1:
        raise ValueError(f"window={window} of attention must be at least 1 token, or None for all")
    if runs is not None:
        if causal or window is not None:
            raise ValueError("runs of attention say all that is seen: leave out causal and window")
        if runs[0].dim() != 3 or runs[0].shape[1:] not in ((B, T), (1, T)) or runs[1].shape != runs[0].shape:
            raise ValueError(
                f"runs of attention are begins and ends [R, {B} or 1, {T}]; got {list(runs[0].shape)} and "
                f"{list(runs[1].shape)}"
            )
    pairs = Pairs(T, S, causal, window, *(runs or (None, None)))
    scale = D**-0.5 if scale is None else scale
    if not scale > 0:  # scaled_dot_product_attention has masked scores times the scale
        raise ValueError(f"scale={scale} of attention must be above 0, or None for D ** -0.5")
    if slopes is None:
        places = None
    elif places is None:
        places = torch.arange(S, device=q.device)
    if not B * T:
        return v.new_empty(B, T, H, v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    backend = choose_path(backend, q, k, v, pairs, sinks, slopes)
    with without_autocast(q):
        if backend != "rows":
            return BACKENDS[backend](q, k, v, pairs, scale, sinks, slopes, places)
        plain = sinks is None and slopes is None and _wants_gradients(q, k, v)
        kept = kept_numbers(pairs, B * H) * q.element_size() if plain else 0
        keep = 0 < kept <= KEPT_BYTES
        return forward(
            q, k, v, pairs.begins, pairs.ends, sinks, slopes, places, scale, causal, window or 0, keep
        )[0]  # fmt: skip


def choose_path(
    backend: str, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, sinks: Tensor | None, slopes: Tensor | None
) -> str:
    """Return the path that is asked for. For "auto", said once in the log of "kernels":

    - "reference" inside torch.func and forward-mode derivatives, which see through nothing else;
    - "sdpa" for all pairs and plain causal attention, for at most `SMALL` pairs, whose mask is small, and on the meta
      device, where nothing is computed; but not for up to `SHORT` queries in bfloat16 on a CPU with gradients;
    - else "flex" on a GPU and "rows" on a CPU.

    Raises:
        ValueError: for a backend that does not exist or that cannot run here.
    """
    names = [*BACKENDS, "rows"]
    if backend not in ("auto", *names):
        raise ValueError(f"unknown backend {backend!r} for attention: choose from auto, {', '.join(names)}")
    if is_transformed(q, k, v, sinks, slopes):
        refuse_transforms("attention", backend, q, k, v, sinks, slopes)
        return "reference"
    if backend != "auto":
        return backend
    plain = (pairs.all or pairs.triangle) and sinks is None and slopes is None
    small = pairs.T * pairs.S <= SMALL
    if (plain or small) and not pairs.all and _rows_are_faster(q, k, v):
        taken, why = "rows", "PyTorch's gradients are slow in bfloat16 on a CPU"
    elif plain:
        taken, why = "sdpa", "it needs no mask here"
    elif small or q.is_meta:
        taken, why = "sdpa", "its mask is small"
    elif q.is_cuda:
        taken, why = "flex", "it makes no table of pairs"
    else:
        taken, why = "rows", "they read only what is seen, the fastest measured on a CPU"
    say("attention", taken, why)
    return taken


def _rows_are_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """As measured on an Intel Xeon with AMX: PyTorch's backward pass is slow there, its forward pass is not."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and q.shape[1] <= SHORT and _wants_gradients(q, k, v)


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
