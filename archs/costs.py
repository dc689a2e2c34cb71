"""What a model costs, from its modules' own counts."""

from dataclasses import dataclass

import torch

from archs.language_model import LanguageModel
from archs.visibility import CAUSAL


@dataclass(frozen=True)
class Costs:
    """flops_per_token: training FLOPs per token (M in C = M x D). Recomputation is not counted.
    params_*: numbers of parameters; active ones are used for each token; non-embedding ones are without the
    embedding, learned positions and the head.
    state_bytes: decode state of one sequence of the given length, in the model's dtype.
    """

    flops_per_token: float
    params_total: int
    params_active: int
    params_non_embedding: int
    state_bytes: int


def costs(model: LanguageModel, T: int, training: float) -> Costs:
    """Costs of `model` on sequences of T tokens, each of which takes so many FLOPs of training. A model on the meta
    device costs no memory and no time."""
    total = sum(p.numel() for p in model.parameters())
    layers = (model.embedding, model.head, model.positions)
    ends = {id(p): p.numel() for layer in layers if layer is not None for p in layer.parameters()}
    inactive = sum(block.channel.inactive_params for block in model.blocks if block.channel is not None)
    with torch.no_grad():
        tokens_1T = torch.zeros(1, T, dtype=torch.long, device=model.embedding.weight.device)
        time = tokens_1T if model.time is not None else None
        _, states = model.extend(tokens_1T, model.empty_states(1), CAUSAL, time)
    return Costs(
        flops_per_token=training / T,
        params_total=total,
        params_active=total - inactive,
        params_non_embedding=total - sum(ends.values()),
        state_bytes=sum(state.nbytes for state in states),
    )
