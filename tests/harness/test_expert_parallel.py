"""A run whose experts are dealt out to processes is the run on one: weights, losses, evaluations, but for rounding."""

import itertools
import os

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from archs.channels.moe import MoE
from experiments.harness import processes
from experiments.harness.checkpoints import generations
from experiments.harness.expert_parallel import DealtExperts
from experiments.harness.run import execute
from tests.harness.test_large_runs import BEGUN, SMALL, compare, on

BIASED = (
    "arch=qwen3_moe",
    "arch.model.channels.moe.balance_loss=1.0",
    "+arch.model.channels.moe.bias_update_rate=0.01",
)
WIDTH = 16
# And how a run is spread besides.
MIXTURES = {
    "noised": ((*BIASED, "objective=uniform_diffusion"), ()),
    "shared": (("arch=deepseek_v3", "trainer.evaluations=2"), ("trainer.recompute=true",)),
    "muon": (("arch=qwen3_moe", "optim=muon"), ()),
    "adapters": (("arch=qwen3_moe", "adapter=lora", "adapter.rank=2"), ()),
    "passes": (("arch=qwen3_moe", "arch.model.channels.moe.balance_loss=0"), ("trainer.microbatch=2",)),
}


def mixture(far: bool) -> MoE:
    """Eight experts, of which only the first two are chosen where it is `far`."""
    torch.manual_seed(0)
    settings = {"activation": "silu", "gated": True, "expansion": 2.0, "gate": "softmax", "normalise": True}
    layer = MoE(WIDTH, experts=8, top_k=2, bias=True, **settings).double()
    for bias in (layer.gate_up.bias, layer.out_proj.bias):
        nn.init.normal_(bias)
    if far:
        layer.router.linear.bias.data[:2] += 100.0
    return layer


def rows_of(rank: int) -> slice:
    """The tokens of a process: that of rank 1 has none."""
    return slice(0, 0) if rank == 1 else slice(2 * rank, 2 * rank + 4)


def run_on(layer: MoE, rows: slice) -> tuple[Tensor, Tensor]:
    x_BTD = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, rows]
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD = layer(x_BTD)
    (y_BTD * torch.arange(WIDTH)).sum().backward()
    return y_BTD.detach(), x_BTD.grad


def dealt_out(overs: tuple[int, ...]) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """What mixtures, near and far and dealt out to so many processes, make of the rows of this one, with its gradients,
    and the gradients and the weights of all experts."""
    found = []
    with processes.group(torch.device("cpu"), int(os.environ["LOCAL_RANK"])):
        for over, far in itertools.product(overs, (False, True)):
            layer = mixture(far)
            dealt = DealtExperts(layer, over, torch.device("cpu"))
            assert len(layer.gate_up.weight) == 8 // over
            here = [*run_on(layer, rows_of(processes.rank()))]
            dealt.take_mean()
            gradients = [dealt.whole(parameter.grad) for parameter in dealt.parameters]
            dealt.join()
            found.append((here, gradients, [parameter.detach() for parameter in dealt.parameters]))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "overs"), [(2, (2,)), (4, (2, 4))])
def test_tokens_go_to_the_processes_of_their_experts_and_come_back_as_from_experts_at_home(tmp_path, number, overs):
    config = LaunchConfig(
        1, 1, number, rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path)),
    )  # fmt: skip
    found = elastic_launch(config, dealt_out)(overs)
    for case, (_, far) in enumerate(itertools.product(overs, (False, True))):
        layer = mixture(far)
        for rank in range(number):
            torch.testing.assert_close(found[rank][case][0], [*run_on(layer, rows_of(rank))])
        experts = [*layer.gate_up.parameters(), *layer.out_proj.parameters()]
        assert ((layer.gate_up.weight.grad == 0).flatten(1).all(1).sum() == 6) == far
        for rank in range(number):
            _, gradients, weights = found[rank][case]
            torch.testing.assert_close(gradients, [p.grad / number for p in experts])
            assert all(map(torch.equal, weights, experts))


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "overs"), [(2, dict.fromkeys(MIXTURES, 2)), (4, {"shared": 2, "noised": 4})])
def test_a_run_whose_experts_are_dealt_out_is_that_on_one_and_goes_on_with_them_dealt_otherwise(
    make_run, data, tmp_path, number, overs
):
    def make(name, root, *more):
        settings, besides = MIXTURES[name]
        return make_run(*SMALL, *settings, *(besides if more else ()), f"session.root={tmp_path / root}", *more)

    jobs, done, stopped, later = [], [], [], []
    for name, over in overs.items():
        truth = make(name, "alone")
        row = execute(truth, data)
        assert row["status"] == "done", row["error"]
        known = {column: row[column] for column in BEGUN}
        run = make(name, "dealt", f"trainer.devices={number}", f"trainer.experts={over}")
        assert run.id == truth.id
        jobs.append((run, data, known, False))
        done.append((run, truth, row))
        if name in ("shared", "muon", "noised"):
            first, then = (
                make(name, "on", f"trainer.devices={n}", f"trainer.experts={o}", "session.checkpoint_seconds=0")
                for n, o in ((number, over), (number // 2, over // 2))
            )
            stopped.append((first, data, known, True))
            later.append((then, data, known, False))
            done.append((then, truth, row))
    found = on(number, jobs + stopped, tmp_path / "logs")
    assert found[len(jobs) :] == [{"status": "stopped"}] * len(stopped)
    assert all([step for step, _ in generations(run.folder)] == [2, 1] for run, *_ in stopped)
    again = on(number // 2, later, tmp_path / "more_logs")
    rows = {id(job[0]): row for job, row in zip(jobs + later, found[: len(jobs)] + again, strict=True)}
    for run, truth, true_row in done:
        compare(run, rows[id(run)], truth, true_row)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("trainer.devices=4", "trainer.experts=3"), "experts=3 does not divide the 4 processes"),
        (("trainer.devices=2", "trainer.experts=2"), "arch=transformer has no experts: take experts=1"),
        (("trainer.devices=3", "trainer.experts=3", "arch=qwen3_moe"), "does not divide the 16 experts of arch=qwen3"),
        (("trainer.devices=2", "trainer.experts=2", "trainer.strategy=fsdp", "arch=qwen3_moe"), "take strategy=ddp"),
    ],
)
def test_experts_that_cannot_be_dealt_out_as_is_asked_are_refused(make_run, data, changes, words):
    with pytest.raises(ValueError, match=words):
        execute(make_run(*SMALL, *changes), data)
