"""Hidden states and choices of experts, recorded by hooks: the model itself knows nothing of it.

Shape letters: B sequences, T tokens, N all of them, D model width, U units, K experts per token.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from archs.channels.router import Router
from archs.language_model import LanguageModel
from experiments.harness.parts import build_model
from experiments.harness.weights import FinishedRun


@torch.no_grad()
def hidden_states(model: LanguageModel, tokens_BT: Tensor) -> dict[tuple[str, int], Tensor]:
    """Return the vectors of tokens at each place of the model, by its kind and the number of the block, from 1 on.

    "stream" is the residual stream [B, T, D] behind the block, "units" [B, T, U] what the parts of the block project
    onto it, side by side: the outputs of heads, the memories of a recurrence as they are read, the hidden layer of an
    MLP. Experts have no units, since a token goes through a few of them only.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}

    def note(place: tuple[str, int], x: Tensor) -> None:
        found.setdefault(place, []).append(x)

    with ExitStack() as hooks:
        for number, block in enumerate(model.blocks, 1):
            stream, units = ("stream", number), ("units", number)
            hooks.enter_context(block.register_forward_hook(lambda *call, to=stream: note(to, call[2][0])))
            for part in (block.mixer, block.channel):
                for layer in part.residual_projections() if part is not None else ():
                    if isinstance(layer, nn.Linear):
                        hook = layer.register_forward_pre_hook(lambda *call, to=units: note(to, call[1][0]))
                        hooks.enter_context(hook)
        model.hidden(tokens_BT)
    return {place: torch.cat(vectors, dim=-1) for place, vectors in found.items()}


@torch.no_grad()
def chosen_experts(model: LanguageModel, tokens_BT: Tensor) -> dict[int, Tensor]:
    """Return the experts [B, T, K] that each token goes to, by the number of the block, from 1 on, of those that have
    routers."""
    found: dict[int, Tensor] = {}

    def note(number: int, chosen_NK: Tensor) -> None:
        found[number] = chosen_NK.unflatten(0, tokens_BT.shape)

    routers = {
        number: module
        for number, block in enumerate(model.blocks, 1)
        for module in block.modules()
        if isinstance(module, Router)
    }
    with ExitStack() as hooks:
        for number, router in routers.items():
            hooks.enter_context(router.register_forward_hook(lambda *call, to=number: note(to, call[2][1])))
        model.hidden(tokens_BT)
    return found


def untrained(finished: FinishedRun) -> LanguageModel:
    """Return the model of a run with random weights, drawn from its seed, to compare the trained one with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(finished.config.seed)
        return build_model(finished.config, finished.objective).eval()
