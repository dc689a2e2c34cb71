"""Tokens that an indexer picks: the loss of attention that reads them alone, and the weight that attention to all
tokens would give them (DeepSeek-AI, DeepSeek-V3.2-Exp, section 2.1).

Shape letters: B windows, T queries and keys, D model width, H heads, K picked keys of a query.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from archs.mixers.attention import Attention
from archs.mixers.softmax import positions_of
from archs.mixers.sparse_attention import SparseAttention
from archs.visibility import Visibility
from experiments.data.windows import heldout_windows
from experiments.findings import Verdict
from experiments.harness.weights import FinishedRun
from experiments.studies.ablation import Ablation, counted
from experiments.studies.study import Cell
from kernels import lightning_indexer

WINDOWS = 32  # held-out ones that attention is looked at on
SHARES = {"picked": "those picked", "last": "as many last ones", "best": "the best"}


@dataclass(frozen=True)
class PickedTokens(Ablation):
    """Tunes, trains and compares as an ablation does, and looks at the attention of the variants that have an
    indexer."""

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Return what `shares` gives, in the mean over layers with an indexer; nothing of the runs that tune."""
        if cell.labels["stage"] == "tune":
            return [{}]
        tokens_BT, _ = heldout_windows(finished.data.heldout, finished.config.data.sequence_length)
        inputs_BT = F.pad(tokens_BT[:WINDOWS, :-1], (1, 0), value=finished.data.eot)
        found: list[dict[str, float]] = []
        mixers = [module for module in finished.model.modules() if isinstance(module, SparseAttention)]

        def look(mixer: SparseAttention, inputs: tuple) -> None:
            found.append(shares(mixer, *inputs[:2]))

        with ExitStack() as hooks, torch.no_grad():
            for mixer in mixers:
                hooks.enter_context(mixer.register_forward_pre_hook(look))
            finished.model.eval().hidden(inputs_BT.to(next(finished.model.parameters()).device))
        return [{name: float(np.mean([layer[name] for layer in found])) for name in SHARES} if found else {}]

    def verdict(self, table: pd.DataFrame) -> Verdict:
        verdict = super().verdict(table)
        if not {*SHARES} <= {*table}:
            return verdict
        means = counted(table).groupby("variant", sort=False)[list(SHARES)].mean().dropna()
        said = "; ".join(
            f"{name} {', '.join(f'{words} {row[column]:.2f}' for column, words in SHARES.items())}"
            for name, row in means.iterrows()
        )
        return replace(verdict, sentence=f"{verdict.sentence} Of the weight of attention to all tokens have: {said}.")


def shares(mixer: SparseAttention, x_BTD: Tensor, visibility: Visibility) -> dict[str, float]:
    """Return the fractions of the weight of attention to all tokens, in the mean over heads, that fall on as many of
    them as the mixer picks: on the picked ones, on the last and on those of most weight; in the mean over the queries
    that see more. x, visibility: its input.

    Raises:
        ValueError: where the attention is not that of `Attention`.
    """
    attention, T, K = mixer.attention, x_BTD.shape[1], mixer.top_k
    if not isinstance(attention, Attention):
        raise ValueError(f"an indexer over {type(attention).__name__} is not looked into: take Attention")
    position = positions_of(x_BTD, visibility, None)
    q, k, _ = attention.project(x_BTD, position)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    unseen_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
    scores_BHTT = attention.scale * torch.einsum("bthd,bshd->bhts", q, k).float()
    weight_BTT = scores_BHTT.masked_fill(unseen_TT, -torch.inf).softmax(-1).mean(1)
    index_q, index_weights = mixer.indexer.queries(x_BTD, x_BTD, position)
    index_k = mixer.indexer.keys(x_BTD, position)[:, :, 0]
    picked_BTK = lightning_indexer(index_q, index_k, index_weights, K)[:, K:]
    weight_BTT = weight_BTT[:, K:]
    return {
        "picked": weight_BTT.gather(2, picked_BTK.long()).sum(-1).mean().item(),
        "last": weight_BTT.tril(K).triu(1).sum(-1).mean().item(),
        "best": weight_BTT.topk(K, dim=-1).values.sum(-1).mean().item(),
    }
