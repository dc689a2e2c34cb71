"""The named backbones: each composes, costs what it says, trains under each objective, and is what it is named for."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.anatomy import anatomy
from experiments.harness.optim import adamw
from objectives.block_diffusion import BlockDiffusion
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.uniform_diffusion import UniformDiffusion

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "arch").glob("*.yaml"))
# Those whose every mixer is attention without a window or an indexer.
CAN_DO_BLOCKS = {"gpt2", "transformer", "llama3", "llada", "qwen3", "qwen3_moe", "deepseek_v3"}
every = pytest.mark.parametrize("name", NAMES)


def composed(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("anatomy", [f"arch={name}", *overrides])


@every
def test_the_name_of_a_config_is_that_of_its_file(name):
    assert composed(name).arch.name == name


OBJECTIVES = {
    "next_token": NextToken,
    "multi_token": partial(NextToken, ahead=1),
    "masked_diffusion": MaskedDiffusion,
    "block_diffusion": partial(BlockDiffusion, block_size=8),
    "uniform_diffusion": UniformDiffusion,
}


@every
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_a_repeating_sequence_under_every_objective_that_it_can_do_with_nothing_but_its_config(
    name, objective
):
    torch.manual_seed(0)
    objective = OBJECTIVES[objective](vocab_size=11, eot=0)
    config = composed(name, "arch.width=32")
    model = instantiate(config.arch.model, vocab_size=objective.model_vocab_size, **objective.model_options)
    if objective.visibility.kind not in model.visibilities:
        assert isinstance(objective, BlockDiffusion) and name not in CAN_DO_BLOCKS
        return
    assert not isinstance(objective, BlockDiffusion) or name in CAN_DO_BLOCKS
    optimizer = adamw(model, learning_rate=0.01, base_width=32, betas=(0.9, 0.95), weight_decay=0.0)
    tokens_BT = torch.arange(40).remainder(5).expand(8, -1) + 1
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        loss = objective.loss(model, tokens_BT, generator)
        optimizer.zero_grad()
        (loss + sum(model.auxiliary_losses().values())).backward()
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


@every
def test_costs_at_a_longer_length_are_those_of_a_model_that_remembers_more_or_the_same(name):
    short, long = (anatomy(composed(name, f"data.sequence_length={T}"), T) for T in (64, 256))
    assert long["state_bytes@256"] >= short["state_bytes@64"] > 0
    assert long["flops_per_token@256"] >= 0.9 * short["flops_per_token@64"]
    assert long["active"] <= long["params"]
    assert (long["active"] < long["params"]) == (
        name in {"qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "deepseek_v32"}
    )
