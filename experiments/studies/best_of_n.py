"""The best of n answers by a proxy: what its gold reward is expected to be, and how far it is from one answer.

Shape letters: N answers of a pool.
"""

import numpy as np
from scipy.special import gammaln


def expected_best(n: int, proxy_N: np.ndarray, gold_N: np.ndarray) -> float:
    """Returns the expected gold reward of that one of n answers which has the highest proxy reward, by chance where
    several have.

    Of all subsets of n of the pool the mean, so an estimate without bias whatever the pool's size: in the order of the
    proxy answer i (from 1 on) is the best of C(i - 1, n - 1) of the C(N, n) subsets (Nakano et al., arXiv 2112.09332,
    appendix I).

    Args:
        n: from 1 to the size of the pool.
        proxy_N, gold_N: rewards of each answer; gold may be the proxy itself.

    Raises:
        ValueError: for another n.
    """
    N = len(proxy_N)
    if not 1 <= n <= N:
        raise ValueError(f"n={n} must be from 1 to the {N} answers of the pool")
    levels, level_N, count = np.unique(proxy_N, return_inverse=True, return_counts=True)
    # Subsets whose best is at a level are those from this and lower levels, but for those from lower levels alone.
    within = np.exp(log_choose(np.cumsum(count), n) - log_choose(np.array(N), n))
    share = np.diff(within, prepend=0.0)
    return float((share / count)[level_N] @ gold_N)


def log_choose(m: np.ndarray, n: int) -> np.ndarray:
    """Returns log C(m, n), minus infinity where m < n."""
    m = np.asarray(m, float)
    return np.where(m < n, -np.inf, gammaln(m + 1) - gammaln(n + 1) - gammaln(np.maximum(m - n, 0) + 1))


def divergence(n: int) -> float:
    """Returns KL(best of n || one answer) = log n - (n - 1) / n in nats (Stiennon et al., arXiv 2009.01325, appendix
    G.3), for rewards that no two answers share; an upper bound where some do (Beirami et al., arXiv 2401.01879)."""
    return float(np.log(n) - (n - 1) / n)
