"""Linear probes and single units, judged by the area under the ROC curve on other examples than those fitted on.

Shape letters: N examples, F features of one, S two-valued labels of one.
"""

from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse
from scipy.stats import rankdata

PENALTY = 1e-3  # of a probe's squared weights, per example that it is fitted on
Features = np.ndarray | csr_matrix


def probe(x_NF: Features, labels_NS: np.ndarray, other_N: np.ndarray) -> dict[str, np.ndarray]:
    """Fit the labels of the examples that are not `other` by regularised least squares; return the areas [S] of what it
    says, "probe_fitted" on these examples and "probe" on the others."""
    said_NS = x_NF @ least_squares(x_NF[~other_N], labels_NS[~other_N])
    areas = {"probe_fitted": ~other_N, "probe": other_N}
    return {name: np.diag(areas_under_roc(said_NS[rows], labels_NS[rows])) for name, rows in areas.items()}


def least_squares(x_NF: Any, labels_NS: np.ndarray) -> np.ndarray:
    """Return the weights [F, S] of the regularised least-squares fit of labels, less their means, by features whose
    means are 0 or that have a constant among them."""
    y_NS = labels_NS.astype(np.float64)
    gram_FF = x_NF.T @ x_NF
    gram_FF = gram_FF.toarray() if issparse(gram_FF) else gram_FF
    np.fill_diagonal(gram_FF, gram_FF.diagonal() + PENALTY * len(y_NS))
    return np.linalg.solve(gram_FF, x_NF.T @ (y_NS - y_NS.mean(0)))


def best_unit(x_NF: np.ndarray, labels_NS: np.ndarray, other_N: np.ndarray) -> dict[str, np.ndarray]:
    """Choose for each label the feature that tells it best, whichever way, where examples are not `other`; return which
    it is, "best_unit" [S], and its areas [S], "unit_fitted" there and "unit" on the others."""
    fitted_FS = areas_under_roc(x_NF[~other_N], labels_NS[~other_N])
    best_S = np.abs(fitted_FS - 0.5).argmax(0)
    fitted_S = np.take_along_axis(fitted_FS, best_S[None], 0)[0]
    area_S = np.diag(areas_under_roc(x_NF[other_N][:, best_S], labels_NS[other_N]))
    up_S = fitted_S >= 0.5
    return {
        "best_unit": best_S,
        "unit_fitted": np.where(up_S, fitted_S, 1 - fitted_S),
        "unit": np.where(up_S, area_S, 1 - area_S),
    }


def areas_under_roc(x_NF: np.ndarray, labels_NS: np.ndarray) -> np.ndarray:
    """Return [F, S]: how often a feature is larger where a label is true than where it is not, ties counting half
    (Mann and Whitney's U over the number of pairs); NaN for a label that is the same everywhere."""
    ranks_NF, true_S = rankdata(x_NF, axis=0), labels_NS.sum(0)
    pairs_S = true_S * (len(labels_NS) - true_S)
    wins_FS = ranks_NF.T @ labels_NS.astype(np.float64) - true_S * (true_S + 1) / 2
    return wins_FS / np.where(pairs_S, pairs_S, np.nan)


def standardised(x_NF: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """Return features of mean 0 and variance 1 where examples are not `other`; one that does not vary there is 0."""
    fitted = x_NF[~other_N].astype(np.float64)
    spread_F = fitted.std(0)
    return (x_NF - fitted.mean(0)) / np.where(spread_F > 0, spread_F, np.inf)


def one_hot(tokens_N: np.ndarray, where: np.ndarray, last: int, vocab_size: int) -> csr_matrix:
    """Return which token stands at each of these places, and at each of the last - 1 before it, [len(where), last *
    vocab_size]; the first place is at least last - 1."""
    columns = np.stack([tokens_N[where - back].astype(np.int64) + back * vocab_size for back in range(last)], axis=1)
    rows = np.repeat(np.arange(len(where)), last)
    return csr_matrix((np.ones(columns.size), (rows, columns.ravel())), shape=(len(where), last * vocab_size))
