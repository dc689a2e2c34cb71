"""How many heads a width has."""

import math


def heads_for(width: int, head_dim: int, multiple: int = 1) -> int:
    """The number of heads that brings a head nearest to `head_dim` dimensions while width / heads is even.

    So all heads together are exactly as wide as the model at every width, and cost grows smoothly with the width
    that a sweep dials: a fixed head dimension would make it jump. Below 1.5 head_dim there is one head.

    Args:
        multiple: the number of heads must be a multiple of this (grouped heads).

    Raises:
        ValueError: when no number of heads fits.
    """
    fitting = [h for h in range(multiple, width // 2 + 1, multiple) if width % (2 * h) == 0]
    if not fitting or head_dim < 2:
        raise ValueError(
            f"width {width} cannot be cut into even heads of about head_dim {head_dim} in groups of {multiple}: choose "
            f"a width that is a multiple of {2 * multiple} and a head_dim of at least 2"
        )
    return min(fitting, key=lambda h: (abs(math.log(h * head_dim / width)), h))
