"""Measures of how far a trained network falls apart into modules, by what its units do and by how they are wired.

Units are what the parts of the blocks project onto the residual stream: hidden layers of MLPs, outputs of heads.

Shape letters: B problems, T tokens, U units of a part, D model width, N units of all parts and of the stream.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.language_model import LanguageModel
from experiments.harness.tasks import heldout_problems, texts_of
from experiments.harness.weights import FinishedRun
from experiments.studies.hidden_states import hidden_states
from objectives.contracts import Batch, Objective
from objectives.post_training.wiring import GAP, lengths, wires

NEGLIGIBLE = 0.01  # of the largest weight of its layer


def problems_by_task(finished: FinishedRun) -> dict[str, Batch]:
    """Return the held-out problems of each task of an environment of several.

    Raises:
        ValueError: for data without an environment.
    """
    data = finished.data
    if data.environment is None:
        raise ValueError(f"{data.name} has no environment that tells its tasks apart: choose data=tasks")
    task = data.environment.task
    batch = heldout_problems(data, finished.config.data.sequence_length)
    names = [task(prompt) for prompt, _ in texts_of(data, batch.tokens_BT, batch.counted_BT)]
    rows = {name: torch.tensor([other == name for other in names]) for name in sorted(set(names))}
    return {name: Batch(batch.tokens_BT[mine_B], batch.weights_BT[mine_B]) for name, mine_B in rows.items()}


@torch.no_grad()
def greedy_accuracy(model: LanguageModel, objective: Objective, batch: Batch) -> float:
    """Return the fraction of answers of which every token is the likeliest."""
    wrong_BT = torch.zeros_like(batch.counted_BT)
    likeliest_N = objective.logits(model, batch).argmax(-1)
    wrong_BT[batch.counted_BT] = likeliest_N != batch.tokens_BT[batch.counted_BT]
    return float((~wrong_BT.any(1)).double().mean())


@torch.no_grad()
def contributions(finished: FinishedRun, batch: Batch) -> Tensor:
    """Return for each unit, part by part, how much of what it writes to the residual stream tells one problem of a task
    from another: its standard deviation over problems, root mean square over the places up to the last that is
    predicted, times the norm of its weights into the stream: [units]. (The task variance of Yang et al., Nature
    Neuroscience 22, 2019, as a root and with the weights.)"""
    last = int(batch.counted_BT.any(0).nonzero().max())
    inputs_BT = F.pad(batch.tokens_BT[:, :last], (1, 0), value=finished.data.eot)
    written = hidden_states(finished.model, inputs_BT)
    deviation = [x_BTU.double().var(0).mean(0).sqrt() for (kind, _), x_BTU in written.items() if kind == "units"]
    norms = [layer.weight.double().norm(dim=0) for layer, writes in wired(finished.model) if writes]
    return torch.cat(deviation) * torch.cat(norms)


@torch.no_grad()
def importances(model: LanguageModel, objective: Objective, batch: Batch) -> Tensor:
    """Return which part of the probability of right answers (their geometric mean) is lost when a unit has, at each
    place of a window, its mean over the problems: for each unit, part by part, from 0, also where none is lost, to
    1."""
    nats = lambda: float(objective.evaluate(model, batch, torch.Generator()).nats_B.mean())  # noqa: E731
    unharmed, found = nats(), []
    for layer in (layer for layer, writes in wired(model) if writes):
        for unit in range(layer.in_features):

            def silence(layer: nn.Module, given: tuple[Tensor], unit: int = unit) -> tuple[Tensor]:
                x_BTU = given[0].clone()
                x_BTU[..., unit] = x_BTU[..., unit].mean(0)
                return (x_BTU,)

            with layer.register_forward_pre_hook(silence):
                found.append(nats() - unharmed)
    return 1 - torch.exp(-torch.tensor(found, dtype=torch.float64).clamp(min=0))


def wired(model: LanguageModel) -> Iterator[tuple[nn.Linear, bool]]:
    """Yield the linear layers of the blocks, each with whether it writes to the residual stream."""
    writing = {id(x) for b in model.blocks for p in (b.mixer, b.channel) if p for x in p.residual_projections()}
    for layer, _ in wires(model):
        yield layer, id(layer) in writing


def specialisation(first: Tensor, second: Tensor) -> float:
    """Return how far one task's units are others than another's: the total variation distance of what units are to each
    (contributions or importances), as parts of the sum. 0: the same; 1: no unit is anything to both. With parts a and b
    that is the mean of |a - b| / (a + b), weighted by a + b."""
    return float((first / first.sum() - second / second.sum()).abs().sum() / 2)


def effective(units: Tensor) -> float:
    """Return the effective number of units, the inverse of the sum of their squared parts of the sum."""
    return float(units.sum() ** 2 / units.square().sum())


def mean_length(model: LanguageModel) -> float:
    """Return the mean length of the wires, without the gap between layers, weighted by |weight|; 1/3 for such as do not
    go by the place."""
    layers = [(layer.weight.detach().abs(), lengths(layer, copies) - GAP) for layer, copies in wires(model)]
    return float(sum((w * d).sum() for w, d in layers) / sum(w.sum() for w, _ in layers))


def negligible(model: LanguageModel) -> float:
    """Return the fraction of the blocks' weights below NEGLIGIBLE of the largest of their layer."""
    weights = [layer.weight.detach().abs() for layer, _ in wires(model)]
    return float(torch.cat([(w < NEGLIGIBLE * w.max()).flatten() for w in weights]).double().mean())


def adjacency(model: LanguageModel) -> np.ndarray:
    """Return the sums of |weights| between the units of the stream, which come first, and those of all parts: [N, N],
    symmetric."""
    D, columns, between_DU = model.width, [], torch.zeros(model.width, 0)
    for (layer, copies), (_, writes) in zip(wires(model), wired(model), strict=True):
        weight = layer.weight.detach().abs().cpu()
        if not writes:
            units = layer.out_features // copies
            between_DU = weight.unflatten(0, (copies, units)).sum(0).T
        else:
            columns.append(between_DU + weight)
    all_DU = torch.cat(columns, dim=1).double().numpy()
    N = D + all_DU.shape[1]
    found = np.zeros((N, N))
    found[:D, D:], found[D:, :D] = all_DU, all_DU.T
    return found


def modularity(adjacency_NN: np.ndarray) -> float:
    """Return Newman's Q of the graph cut in two by the leading eigenvector of its modularity matrix (Newman, PNAS 103,
    2006, equations 1 to 4)."""
    degree_N = adjacency_NN.sum(0)
    matrix_NN = adjacency_NN - np.outer(degree_N, degree_N) / degree_N.sum()
    side_N = np.sign(np.linalg.eigh(matrix_NN)[1][:, -1])
    return float(side_N @ matrix_NN @ side_N / (2 * degree_N.sum()))
