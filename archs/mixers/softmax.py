"""Softmax attention over what is visible: what every attention mixer stands on.

Shape letters: B sequences, T queries, S keys, D dimensions (of x the model width), H query heads, G key-value heads, E
value dimensions.
"""

from typing import Any

import torch
from torch import Tensor

from archs.contracts import State
from archs.positions import Alibi, Positions
from archs.visibility import Kind, Visibility
from kernels import attention, largest_scores


def positions_of(x_BTD: Tensor, visibility: Visibility, state: State | None) -> Positions:
    """Positions of the tokens of x, which continue those in the state; the same for all layers of a pass.

    Raises:
        ValueError: for packed documents that are to continue a state.
    """
    if state is not None and visibility.starts_BL is not None:
        raise ValueError("packed documents start from nothing: run them without a state, or each by itself with one")
    T, offset = x_BTD.shape[1], 0 if state is None else state.length
    return visibility.once(("positions", T, offset), lambda: Positions(visibility.positions(T, offset, x_BTD.device)))


def in_attention(x: Tensor) -> Tensor:
    """Return keys or values in the dtype that attention computes in, which is what a cache keeps of them: autocast's
    where it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if device != "meta" and torch.is_autocast_enabled(device) else x


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
    S, H = k_BSGD.shape[1], q_BTHD.shape[2]
    slopes_H = places = None
    if alibi is not None:
        slopes_H = alibi.slopes(H, q_BTHD.device).to(torch.promote_types(q_BTHD.dtype, torch.float32))
        places = torch.arange(S, device=q_BTHD.device) % (S // visibility.copies)
    return attention(
        q_BTHD,
        k_BSGD,
        v_BSGE,
        **_extent(q_BTHD, k_BSGD, visibility, window),
        scale=scale,
        sinks=sinks_H,
        slopes=slopes_H,
        places=places,
    )


def largest_logits(
    q_BTHD: Tensor, k_BSGD: Tensor, visibility: Visibility, *, scale: float, window: int | None = None
) -> Tensor:
    """Return the largest scale q . k of each head over the pairs that are seen, [H] float32 without a gradient;
    arguments as in `attend`, of which biases by distance are left out."""
    return largest_scores(q_BTHD, k_BSGD, **_extent(q_BTHD, k_BSGD, visibility, window), scale=scale)


def _extent(q_BTHD: Tensor, k_BSGD: Tensor, visibility: Visibility, window: int | None) -> dict[str, Any]:
    """Which keys the queries see, as the kernels take it."""
    T, S = q_BTHD.shape[1], k_BSGD.shape[1]
    window = None if window is None or window >= S else window
    runs = visibility.once(("runs", T, window), lambda: visibility.runs(T, window, q_BTHD.device))
    if runs is not None:
        return {"runs": runs}
    return {"causal": visibility.kind is Kind.CAUSAL, "window": window}
