"""What the ledger counts: every operation with Triton kernels, on problems whose bytes are no chance.

Where what is moved hangs on data, the data is chosen and not drawn. The picks of sparse attention all exist, and
together they name every key: programs gather the same number of rows wherever these lie. The experts of a grouped
product have equally many rows, and all tokens of a cross entropy count. What the indexer loads hangs on no score.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.bench.operations import CONTESTS, DTYPES
from kernels import (
    cross_entropy,
    delta_rule_flops,
    delta_step,
    fast_weights,
    gated_delta_step_flops,
    grouped,
    indexer,
    lightning_indexer,
    lightning_indexer_flops,
    lightning_indexer_keys,
    sparse,
    sparse_attention,
)
from kernels.common.launch import block_sizes
from kernels.common.operation import Operation


class Blocks(NamedTuple):
    """The blocks of tokens that an operation takes one after the other.

    Attributes:
        function: the name of that which says how many tokens a block has, for the ledger to put its own there.
        arguments: shape -> its arguments.
    """

    function: str
    arguments: Callable[[dict], tuple[int, ...]]

    def size(self, shape: dict) -> int:
        """Return how many tokens a block has."""
        return resolve_name(self.function)(*self.arguments(shape))


class Countable(NamedTuple):
    """An operation with all that its count needs.

    Attributes:
        operation: ours.
        problem: tokens and sizes -> inputs by name.
        flops: tokens and shape -> FLOPs of the products of a forward pass.
        arguments: sizes that are arguments of the operation and not of the problem.
        products: pass -> how often those FLOPs are made in it.
        blocks: None where there is but one.
    """

    operation: Operation
    problem: Callable[..., dict[str, Tensor]]
    flops: Callable[[int, dict], float]
    arguments: tuple[str, ...] = ()
    products: dict[str, int] = {"forward": 1, "backward": 2}  # noqa: RUF012
    blocks: Blocks | None = None


def even_picks(
    T: int, *, batch: int, heads: int, head_dim: int, kv_heads: int, value_dim: int, picked: int, keys: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Return inputs of `sparse_attention` by name: picks that all exist, of each query those behind the last one's."""
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    place = torch.arange(T)[:, None] * picked + torch.arange(picked)
    inputs = {"q": normal(batch, T, heads, head_dim), "k": normal(batch, keys, kv_heads, head_dim)}
    inputs["v"] = normal(batch, keys, kv_heads, value_dim)
    return inputs | {"indices": (place % keys).int().expand(batch, -1, -1).contiguous()}


def even_latents(T: int, **sizes) -> dict[str, Tensor]:
    """Return inputs of `latent` by name, as `even_picks`."""
    inputs = even_picks(T, kv_heads=1, value_dim=1, **sizes)
    return {name: x for name, x in inputs.items() if name != "v"}


def kept_keys(T: int, **sizes) -> dict[str, Tensor]:
    """Return inputs of `lightning_indexer` by name, with the keys that a cache keeps in fp8 and their scales."""
    inputs = indexer.OPERATION.random_problem(T, **sizes)
    k, key_scale = lightning_indexer_keys(inputs["k"])
    return inputs | {"k": k, "key_scale": key_scale}


def latent(q: Tensor, k: Tensor, indices: Tensor, *, value_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return `sparse_attention` in its absorbed form."""
    return sparse_attention(q, k, k[..., :value_dim], indices, backend=backend)


def even_loads(T: int, *, batch: int, experts: int, **sizes) -> dict[str, Tensor]:
    """Return inputs of `grouped_matmul` by name, with equally many rows for every expert."""
    inputs = grouped.OPERATION.random_problem(T, batch=batch, experts=experts, **sizes)
    return inputs | {"counts": torch.full_like(inputs["counts"], batch * T // experts)}


def all_tokens(T: int, **sizes) -> dict[str, Tensor]:
    """Return inputs of `linear_cross_entropy` by name, in which every token has weight 1."""
    inputs = cross_entropy.OPERATION.random_problem(T, **sizes)
    return inputs | {"token_weights": torch.ones_like(inputs["token_weights"])}


HOST = torch.empty(0)

PICKS = Countable(
    replace(indexer.OPERATION, run=lightning_indexer, differentiable=False),
    indexer.OPERATION.random_problem,
    lambda T, s: s["batch"] * lightning_indexer_flops(T, s["keys"], s["heads"], s["head_dim"], s["causal"]),
    arguments=("topk", "causal"),
    blocks=Blocks(
        "kernels.indexer.triton_operators.queries_at_once",
        lambda s: (s["batch"], s["length"], s["keys"], block_sizes("lightning_indexer", s["head_dim"], HOST).rows),
    ),
)
IN_FP8 = replace(
    PICKS.operation, run=partial(lightning_indexer, precision="fp8"), kept=PICKS.operation.kept | {"key_scale"}
)

COUNTABLE = {
    **{
        name: Countable(CONTESTS[name].operation, CONTESTS[name].operation.random_problem, CONTESTS[name].flops)
        for name in ("gated_delta_rule", "ssd", "causal_conv1d")
    },
    "delta_rule": Countable(
        fast_weights.OPERATION,
        fast_weights.OPERATION.random_problem,
        lambda T, s: s["batch"] * delta_rule_flops(T, s["heads"], s["head_dim"], s["head_dim"], per_channel=True),
    ),
    "gated_delta_step": Countable(
        delta_step.OPERATION,
        delta_step.OPERATION.random_problem,
        lambda T, s: s["batch"] * gated_delta_step_flops(s["heads"], s["key_heads"], s["head_dim"], s["value_dim"]),
    ),
    "lightning_indexer": PICKS,
    "lightning_indexer_fp8": PICKS._replace(operation=IN_FP8, problem=kept_keys),
    "sparse_attention": Countable(
        sparse.OPERATION,
        even_picks,
        lambda T, s: (
            s["batch"] * sparse.sparse_attention_flops(T, s["heads"], s["head_dim"], s["value_dim"], s["picked"])
        ),
        blocks=Blocks("kernels.sparse.triton_operators.queries_of_part", lambda s: (s["length"],)),
    ),
    "latent_attention": Countable(
        replace(sparse.LATENT_OPERATION, run=latent),
        even_latents,
        CONTESTS["latent_attention"].flops,
        arguments=("value_dim",),
        blocks=Blocks(  # whose backward pass keeps the numbers of a key for each pair, and two per head
            "kernels.sparse.triton_operators.queries_at_once",
            lambda s: (s["picked"], s["head_dim"] + 2 * s["heads"], DTYPES[s["dtype"]].itemsize),
        ),
    ),
    "grouped_matmul": Countable(grouped.OPERATION, even_loads, CONTESTS["grouped_matmul"].flops),
    "linear_cross_entropy": Countable(
        cross_entropy.OPERATION,
        all_tokens,
        CONTESTS["linear_cross_entropy"].flops,
        products={"forward": 3, "backward": 0},  # gradients are made with the loss
        blocks=Blocks(
            "kernels.cross_entropy.triton_operators.tokens_at_once",
            lambda s: (s["batch"] * s["length"], s["width"]),
        ),
    ),
}
