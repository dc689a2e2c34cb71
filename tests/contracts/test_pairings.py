"""Every backbone learns under every objective that it can do, with nothing but its config; the others are refused."""

import pytest
import torch
from hydra.utils import instantiate

from objectives.contracts import Batch
from tests.contracts.discovery import LENGTH, composed, likelihoods, names

pytestmark = pytest.mark.thorough

PAIRS = [(arch, objective) for arch in names("arch") for objective in likelihoods()]


@pytest.mark.parametrize(("arch", "objective"), PAIRS)
def test_it_learns_a_repeating_sequence(arch, objective):
    torch.manual_seed(0)
    config = composed(f"arch={arch}", "optim.base_width=32")
    objective = instantiate(composed(f"objective={objective}").objective.build, vocab_size=11, eot=0)
    model = instantiate(config.arch.model, vocab_size=objective.model_vocab_size, **objective.model_options)
    if objective.visibility.kind not in model.visibilities:
        with pytest.raises(ValueError, match=f"needs {objective.visibility.kind.value} visibility"):
            objective.check(model, LENGTH)
        return
    optimizer = instantiate(config.optim).build(model.roles(), model.width, 1_000_000)
    batch = Batch.of(torch.arange(LENGTH).remainder(5).expand(8, -1) + 1)

    @torch.no_grad()
    def value() -> float:
        return sum(objective.loss(model, batch, torch.Generator().manual_seed(i)).item() for i in range(4))

    before, generator = value(), torch.Generator().manual_seed(99)
    for _ in range(10):
        loss = objective.loss(model, batch, generator)
        optimizer.zero_grad()
        (loss + sum(model.auxiliary_losses().values())).backward()
        optimizer.step()
        model.after_step()
    assert value() < 0.9 * before
