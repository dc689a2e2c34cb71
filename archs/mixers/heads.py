"""How many heads a width has."""

import math


def cut_heads(width: int, heads: int | None, head_dim: int | None, multiple: int = 1) -> tuple[int, int]:
    """The number of heads and the dimension of each.

    Args:
        width: of all heads together, where either of the two is left open.
        heads: exactly so many, or None for as many as bring their dimension nearest to head_dim (see `heads_for`).
        head_dim: None, with `heads` given, for an equal part of the width: then a model of any width has as many heads,
            and its shape varies smoothly with the width.
        multiple: what the number of heads must be a multiple of, where it is left open.

    Raises:
        ValueError: when neither is given, or the width cannot be cut so.
    """
    if heads is None:
        if head_dim is None:
            raise ValueError("heads and head_dim are both null: give at least one of them")
        heads = heads_for(width, head_dim, multiple)
        return heads, width // heads
    if head_dim is None:
        if width % (2 * heads):
            raise ValueError(
                f"width {width} cannot be cut into {heads} even heads: choose a width that is a multiple of {2 * heads}"
            )
        return heads, width // heads
    return heads, head_dim


def heads_for(width: int, head_dim: int, multiple: int = 1) -> int:
    """The number of heads that brings a head nearest to `head_dim` dimensions while width / heads is even.

    So all heads together are exactly as wide as the model at every width, and cost grows smoothly with the width
    that a sweep dials: a fixed head dimension would make it jump. Below 1.5 head_dim there is one head.

    Args:
        multiple: the number of heads must be a multiple of this (grouped heads).

    Raises:
        ValueError: when no number of heads fits.
    """
    half = width // 2
    small = [h for h in range(1, math.isqrt(half) + 1) if half % h == 0] if width % 2 == 0 else []
    fitting = [h for h in {*small, *(half // h for h in small)} if h % multiple == 0]
    if not fitting or head_dim < 2:
        raise ValueError(
            f"width {width} cannot be cut into even heads of about head_dim {head_dim} in groups of {multiple}: choose "
            f"a width that is a multiple of {2 * multiple} and a head_dim of at least 2"
        )
    return min(fitting, key=lambda h: (abs(math.log(h * head_dim / width)), h))
