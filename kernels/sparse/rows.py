"""Where the keys and values of a cache lie in memory: the few that are picked are read there, and the rest is not
copied.

Shape letters: B sequences, S keys, G key-value heads, D numbers of a row.
"""

from torch import Tensor


def row_steps(x: Tensor) -> tuple[int, int, int]:
    """Return how many rows of D numbers lie between two sequences, two tokens and two heads of x [B, S, G, D] in
    memory, 0 where there is one; x lies in rows."""
    sequences, tokens, heads = (stride // x.shape[3] for stride in _strides(x)[:3])
    return sequences, tokens, heads


def where_they_lie(k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return keys and values as they are where they lie in rows with the same steps between them, else copies that
    do."""
    if _in_rows(k) and (v is None or _in_rows(v) and row_steps(v) == row_steps(k)):
        return k, v
    return k.contiguous(), None if v is None else v.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """Return the memory of x [B, S, G, D], which lies in rows, as a table [rows, D] from its first row to its last."""
    if not x.numel():
        return x.flatten(0, 2)
    last = sum((size - 1) * step for size, step in zip(x.shape[:3], row_steps(x), strict=True))
    return x.as_strided((last + 1, x.shape[3]), (x.shape[3], 1))


def _in_rows(x: Tensor) -> bool:
    """Return whether a row is in one piece and nothing but rows lies between two."""
    *between, within = _strides(x)
    return x.shape[3] > 0 and within <= 1 and not any(stride % x.shape[3] for stride in between)


def _strides(x: Tensor) -> list[int]:
    """Return the strides of x, 0 along what has one place."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
