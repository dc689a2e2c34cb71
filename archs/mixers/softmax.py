"""Softmax attention over what is visible: what every attention mixer stands on.

Shape letters: B sequences, T queries, S keys, L tokens of one copy of a sequence, H query heads, G key-value heads, D
key dimensions, E value dimensions, N blocks of W tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.contracts import State
from archs.positions import Alibi, Positions
from archs.visibility import Kind, Visibility


def positions_of(x_BTD: Tensor, visibility: Visibility, state: State | None) -> Positions:
    """Positions of the tokens of x, which continue those in the state; the same for all layers of a pass.

    Raises:
        ValueError: for packed documents that are to continue a state.
    """
    if state is not None and visibility.starts_BL is not None:
        raise ValueError("packed documents start from nothing: run them without a state, or each by itself with one")
    T, offset = x_BTD.shape[1], 0 if state is None else state.length
    return visibility.once(("positions", T, offset), lambda: Positions(visibility.positions(T, offset, x_BTD.device)))


def attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    window: int | None = None,
    alibi: Alibi | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return what the heads find, [B, T, H, E]. The queries are the last T of the S tokens.

    Args:
        scale: factor on the scores.
        window: tokens that a query sees in each direction that it sees at all, itself included; None for all of them.
        alibi: biases by distance, or None.
        sinks_H: scores that take part in the softmax and carry no value, or None.
    """
    (T, H), (S, G) = q_BTHD.shape[1:3], k_BSGD.shape[1:3]
    causal = visibility.kind is Kind.CAUSAL
    window = None if window is None or window >= S else window
    plain = alibi is None and sinks_H is None
    q_BHTD, k_BGSD, v_BGSE = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGE))
    if window is not None and causal and T == S and plain:
        return _banded(q_BHTD, k_BGSD, v_BGSE, visibility, scale, window).transpose(1, 2)
    whole = causal and T in (1, S) or visibility.kind is Kind.BIDIRECTIONAL
    if plain and whole and window is None and visibility.starts_BL is None:
        mask = None
    else:
        mask = visibility.visible(T, S, window, q_BTHD.device)
        if not plain:
            mask = _biases(mask, T, S, H, q_BTHD, visibility.copies, alibi)
    if sinks_H is not None and mask is not None:
        # A key of zeros with the sink as its bias and no value is the softmax with one more score.
        k_BGSD, v_BGSE = (F.pad(x, (0, 0, 0, 1)) for x in (k_BGSD, v_BGSE))
        sinks_HT1 = sinks_H.to(q_BTHD.dtype)[:, None, None].expand(*mask.shape[:-3], H, T, 1)
        mask = torch.cat([mask, sinks_HT1], dim=-1)
    y_BHTE = F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSE,
        attn_mask=mask[None] if mask is not None and mask.dim() == 3 else mask,
        is_causal=causal and mask is None and T > 1,
        scale=scale,
        enable_gqa=G != H,
    )
    return y_BHTE.transpose(1, 2)


def _biases(
    visible: Tensor | None, T: int, S: int, heads: int, like: Tensor, copies: int, alibi: Alibi | None
) -> Tensor:
    """Additive biases [H, T, S] or [B, H, T, S] in the dtype of `like`: those of Alibi or zeros, and -inf at unseen
    pairs."""
    if alibi is None:
        bias = torch.zeros(heads, T, S, dtype=like.dtype, device=like.device)
    else:
        place_S = torch.arange(S, device=like.device) % (S // copies)
        bias = alibi.bias(place_S[S - T :, None] - place_S, heads).to(like.dtype)
    return bias if visible is None else torch.where(visible, bias, -torch.inf)


def _banded(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, visibility: Visibility, scale: float, window: int
) -> Tensor:
    """Causal window attention, [B, H, T, E], in blocks of one window: each block of queries reads its own block of keys
    and the one before, so time and memory grow with T x window and not with T^2."""
    (B, H, T), G, W = q_BHTD.shape[:3], k_BGTD.shape[1], window
    pad = -T % W
    q = F.pad(q_BHTD, (0, 0, 0, pad)).unflatten(2, (-1, W)).transpose(1, 2)
    k, v = (F.pad(x, (0, 0, W, pad)).unfold(2, 2 * W, W).transpose(1, 2).mT for x in (k_BGTD, v_BGTE))
    N = q.shape[1]
    query, key = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
    band = (key > query) & (key <= query + W)
    # The block before the first one is padding.
    real = (torch.arange(N, device=q.device)[:, None, None] > 0) | (key >= W)
    mask = (band & real).repeat(B, 1, 1)[:, None]
    if visibility.starts_BL is not None:
        document_BT = visibility.documents()
        of_query = F.pad(document_BT, (0, pad)).unflatten(1, (N, W))
        of_key = F.pad(document_BT, (W, pad)).unfold(1, 2 * W, W)
        # Padding behind the end is of no document, but a query there has to see something.
        same = (of_query[..., None] == of_key[..., None, :]) | (of_query[..., None] == 0)
        mask = mask & same.flatten(0, 1)[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=G != H)
    return y.unflatten(0, (-1, N)).transpose(1, 2).flatten(2, 3)[:, :, :T]
