"""A sweep in words: numbers as a reader wants them, and a sentence for each thing that was asked."""

from typing import Any

from experiments.findings import Refused, count, number
from experiments.scaling.results import Analysis, ArmResult, Comparison

SOURCES = {
    "runs": "chance in the runs",
    "learning_rate": "the chosen learning rates",
    "evaluation": "the choice of held-out text",
    "bound": "Monte Carlo in the bounds",
}
UNKNOWN = ("cannot tell", "no difference at this scale")  # outcomes after which a reader asks what would tell more


def sentences(analysis: Analysis) -> list[str]:
    """The findings, one sentence each: verdicts, arms, predictions against outcomes, then what to be wary of."""
    arms = analysis.arms.values()
    lines = [comparison.verdict.sentence for comparison in analysis.comparisons]
    lines += [arm_sentence(arm, analysis.loss) for arm in arms]
    asked = (prediction_sentence(analysis), power_sentence(analysis), error_sentence(analysis))
    lines += [line for line in asked if line]
    return lines + [f"warning: {text}" for text in warnings(analysis)]


def warnings(analysis: Analysis) -> list[str]:
    """Returns what to be wary of, each with the arm that it is about and its consequence."""
    cells = analysis.cells
    lines = [f"{arm.name}: {text}" for arm in analysis.arms.values() for text in arm.warnings]
    if cells.missing or cells.diverged or cells.failed:
        lines.append(
            f"of {cells.planned} cells {cells.missing} are missing, {cells.diverged} diverged, {cells.failed} failed: "
            "the laws are those of the others; start the same command again to run what is missing or failed"
        )
    return [*lines, *analysis.warnings]


def arm_sentence(arm: ArmResult, loss: str) -> str:
    """An arm's level and slope, and its prediction against the outcome."""
    law, held = arm.law, arm.holdout
    if isinstance(law, Refused):
        return f"{arm.name}: no scaling law, {law.refused}"
    kind = f"{loss} (upper bound)" if arm.bound else loss
    level = number(law.bits_per_byte_at_centre)
    line = f"{arm.name}: {level} {kind} at {number(law.centre_flops, 2)} FLOPs, slope {number(law.slope)}"
    if held and held.predicted:
        inside = "inside" if held.inside else "OUTSIDE"
        line += f"; held-out budget predicted {number(held.predicted)}, came out {number(held.bits_per_byte)}"
        line += f", {inside} the interval"
    return line


def prediction_sentence(analysis: Analysis) -> str | None:
    """Say how many outcomes lie inside the intervals that were written before their runs, here and before; None
    without."""
    held = [arm.holdout for arm in analysis.arms.values() if arm.holdout and arm.holdout.inside is not None]
    if not held:
        return None
    inside, record = sum(bool(outcome.inside) for outcome in held), analysis.record
    line = f"{inside} of {len(held)} outcomes at {number(held[0].budget, 2)} FLOPs lie inside their 95 % intervals"
    return line + (f"; in all sweeps of this folder {record.inside} of {record.made}." if record else ".")


def power_sentence(analysis: Analysis) -> str | None:
    """The multipliers that the design tells from 1; None where that is not known."""
    told = [f"{number(c.power.told_apart)} for {c.arm}" for c in analysis.comparisons if c.power]
    if not told:
        return None
    return f"In 80 % of repetitions this design tells from 1 a multiplier (or its inverse) of {listed(told)}."


def error_sentence(analysis: Analysis) -> str | None:
    """Say where most of the uncertainty of the multipliers comes from; None where that is not known."""
    by_source: dict[str, list[str]] = {}
    for comparison in analysis.comparisons:
        if comparison.shares:
            errors = {word: getattr(comparison.shares, name) or 0.0 for name, word in SOURCES.items()}
            largest, total = max(errors, key=errors.__getitem__), sum(error**2 for error in errors.values())
            if total:
                share = f"{errors[largest] ** 2 / total:.0%}".replace("%", " %")
                by_source.setdefault(largest, []).append(f"{share} for {comparison.arm}")
    if not by_source:
        return None
    sources = [f"{source} ({listed(shares)})" for source, shares in by_source.items()]
    return f"The variance of the multipliers comes mostly from {listed(sources)}."


def listed(parts: list[str]) -> str:
    """Parts of a sentence, as "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def remedies(comparison: Comparison) -> list[str]:
    """Returns what it would take to tell each smaller multiplier from 1, with a power of 80 % where it can be had."""
    return [
        f"to tell {number(r.target)}: {f'{r.seeds} seeds per cell, or' if r.seeds else 'no number of seeds;'} "
        f"a larger budget ({number(r.flops, 2)} FLOPs, power {round(100 * r.larger_budget_power)} %)"
        for r in (comparison.power.remedies if comparison.power else ())
    ]


def run_words(row: Any) -> str:
    """A run in four lines, from its row in the ledger."""
    kind = " (upper bound)" if row.bits_per_byte_kind == "bound" else ""
    return (
        f"{row.arm}\n{count(row.params_total)} parameters, {count(row.tokens)} tokens\n"
        f"{number(row.bits_per_byte, 4)} bits per byte{kind}\n"
        f"learning rate {row.learning_rate:g}, seed {row.seed:g}, run {row.id}"
    )
