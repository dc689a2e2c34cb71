"""The settings that a sweep may have."""

from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field

from experiments.harness.identity import plain
from experiments.harness.settings import Closed, Count, Positive, Seed, conform

Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
More = Annotated[int, Field(ge=0)]


class ArmSettings(Closed):
    arch: str
    objective: str
    name: str | None = None
    tokens_per_parameter: Positive | None = None
    sizes: Count | None = None
    overrides: list[str] = []


class HoldoutSettings(Closed):
    budget: Positive
    sizes: Count
    span: Factor
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None


class TuningSettings(Closed):
    budgets: Annotated[list[Positive], Field(min_length=1)]
    learning_rates: Annotated[list[Positive], Field(min_length=2)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    widen: More


class SmallSettings(Closed):
    parameters: Positive
    gpus: Amount


class NeedsSettings(Closed):
    cpus: Count
    gpus: Amount | None
    small: SmallSettings | None
    memory_gb: Positive | None
    minutes: Count
    margin: Factor


class SweepSettings(Closed):
    """The node `sweep`."""

    name: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")]
    arms: Annotated[list[ArmSettings], Field(min_length=1)]
    budgets: Annotated[list[Positive], Field(min_length=1)]
    sizes: Count
    span: Factor
    tokens_per_parameter: Positive
    holdout: HoldoutSettings | None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    tuning: TuningSettings | None
    dry_run: bool
    cell: str | None
    noise: Positive
    recentre: bool
    above_entropy: bool
    widen: More
    needs: NeedsSettings


def check_sweep(config: DictConfig) -> None:
    """Check the settings of a sweep, each by itself.

    Raises:
        ValueError: as `conform` does.
    """
    conform(SweepSettings, plain(config.sweep), "sweep")
