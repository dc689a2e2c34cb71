"""Measure how far published policy gradients point from the gradient of the expected reward:
python -m experiments.gradient_angles

A language of 27 sequences is small enough to enumerate, so the angles are those of expectations. choices.csv has the
choices of an autoregressive policy gradient, at the policy that wrote. likelihoods.csv has what stands for the
likelihood of a diffusion policy: of tables of random logits, whose orders disagree the more the sharper they are, and
of tables after steps of exact ascent from a language whose orders agree.

Shape letters: B sequences, T tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

from experiments.enumeration import (
    END,
    MASK,
    ORDERS,
    SEQUENCES,
    START,
    Known,
    L,
    Table,
    V,
    answers,
    bound_gradient,
    cosine,
    generator,
    gradient,
    group_gradient,
    log_p_by_order,
    log_probs,
    policy_gradient,
    reward_gradient,
    rewards,
)
from experiments.findings import check_writable
from experiments.report.figures import COLOURS, MARKERS
from experiments.terminal import command
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.post_training.policy_gradient import PolicyGradient
from objectives.post_training.sampled_likelihood import Coupled, Exact, OneStep, Trajectory

LIKELIHOODS = {"trajectory": Trajectory(), "bound": None, "coupled": Coupled(), "one_step": OneStep()}
DRAWS = 400  # of the fractions and masks of coupled passes
STEP = 4.0  # of exact ascent


CHOICES: dict[str, dict[str, Any]] = {
    "no baseline": {"baseline": "none"},
    "leave one out": {},
    "mean of the group": {"baseline": "group"},
    "mean of the group, each answer by its length": {"baseline": "group", "normaliser": "length"},
    "mean and standard deviation of the group": {"baseline": "group", "scale": "group"},
    "both (GRPO)": {"baseline": "group", "scale": "group", "normaliser": "length"},
}


def angles(model: Table, reward: torch.Tensor) -> dict[str, float]:
    """Cosines of the expected gradient by each likelihood with the gradient of the expected reward, and the gap in nats
    between log p and its bound, in the mean over what is written."""
    base, reward = MaskedDiffusion(vocab_size=V, eot=0), reward - reward.mean()
    exact, found = reward_gradient(model, reward), {}
    for name, likelihood in LIKELIHOODS.items():
        if likelihood is None:
            found[name] = cosine(bound_gradient(model, reward), exact)
        else:
            draws = DRAWS if name == "coupled" else 1
            found[name] = cosine(policy_gradient(likelihood, base, model, reward, draws), exact)
    with torch.no_grad():
        log_p = log_p_by_order(model)
        whole = log_p.logsumexp(1) - np.log(len(ORDERS))
        found["gap"] = float((whole.exp() * (whole - log_p.mean(1))).sum())
    return found


def coherent(spread: float, seed: int) -> Table:
    """The table of a random language's own conditionals: all of its orders agree."""
    logits = spread * torch.randn(len(SEQUENCES), generator=generator(seed), dtype=torch.float64)
    joint, model = logits.softmax(0), Table(causal=False)
    states = torch.cartesian_prod(*[torch.arange(V + 1)] * L)
    fits = ((states[:, None] == SEQUENCES) | (states[:, None] == MASK)).all(-1).double() * joint
    one_hot = torch.nn.functional.one_hot(SEQUENCES, V).double()
    table = torch.einsum("sn,nlv->slv", fits, one_hot)
    at = (states * (V + 1) ** torch.arange(L)).sum(1)
    with torch.no_grad():
        model.table[at] = (table / table.sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return model


def ascend(model: Table, reward: torch.Tensor, steps: int) -> Table:
    """The same table after steps of exact gradient ascent on the expected reward."""
    for _ in range(steps):
        gain = reward_gradient(model, reward)
        with torch.no_grad():
            model.table.add_(STEP * gain.view_as(model.table))
    return model


def measured(policies: int) -> pd.DataFrame:
    """One row per kind of policy: the means over so many random ones."""
    rows = []

    def add(policy: str, setting: float, models: list[tuple[Table, torch.Tensor]]) -> None:
        found = pd.DataFrame([angles(model, reward) for model, reward in models])
        rows.append({"policy": policy, "setting": setting} | found.mean().to_dict())

    for spread in (0.5, 1.0, 2.0, 4.0):
        add("random logits", spread, [(Table(False, spread, s), rewards(seed=100 + s)) for s in range(policies)])
    for steps in (0, 4, 16, 64):
        pairs = [(coherent(1.0, s), rewards(seed=100 + s)) for s in range(policies)]
        add("after ascent", steps, [(ascend(model, reward, steps), reward) for model, reward in pairs])
    return pd.DataFrame(rows)


def measured_choices(policies: int) -> pd.DataFrame:
    """One row per choice: the mean cosine over so many random policies, for normal rewards of answers that are all as
    long, of answers that end early, and for rewards of 0 and 1 of those."""
    base, rows = NextToken(vocab_size=V, eot=START), []
    for name, options in CHOICES.items():
        found = {"fixed_length": [], "ending": [], "ending_right_or_wrong": []}
        for column, cosines in found.items():
            tokens_BT, counted_BT = answers("ending" in column)
            for seed in range(policies):
                model, reward_B = Table(True, seed=seed), rewards(len(tokens_BT), seed=100 + seed)
                reward_B = (reward_B > 0.5).double() if "right" in column else reward_B
                p_B = log_probs(base, model, tokens_BT, counted_BT).exp()
                exact = gradient((p_B * reward_B).sum(), model)
                objective = PolicyGradient(base, END, Known(tokens_BT, reward_B), Exact(), group=2, **options)
                cosines.append(cosine(group_gradient(objective, model, tokens_BT, counted_BT), exact))
        rows.append({"choice": name} | {column: np.mean(cosines) for column, cosines in found.items()})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Figure:
    """Cosines against the gap between log p and its bound, one panel per kind of policy."""
    canvas = Figure(figsize=(9, 4), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    for panel, (policy, rows) in zip(panels, table.groupby("policy", sort=False), strict=True):
        for i, name in enumerate(LIKELIHOODS):
            panel.plot(range(len(rows)), rows[name], color=COLOURS[i], marker=MARKERS[i], label=name.replace("_", " "))
        panel.set(title=policy, xlabel="spread of the logits" if policy == "random logits" else "steps of exact ascent")
        panel.set_xticks(range(len(rows)), [f"{setting:g}" for setting in rows.setting])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="cosine with the true gradient")
    panels[0].legend()
    return canvas


@command("gradient_angles")
def main(config: DictConfig) -> None:
    out = Path(config.out)
    if config.policies < 1:
        raise ValueError(f"policies={config.policies} must be at least 1")
    check_writable(out / "likelihoods.csv")
    out.mkdir(parents=True, exist_ok=True)
    table = measured(config.policies)
    figure(table).savefig(out / "likelihoods.png", dpi=110)
    for name, found in (("likelihoods", table), ("choices", measured_choices(config.policies))):
        found.to_csv(out / f"{name}.csv", index=False, float_format="%.4g")
        print(found.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
