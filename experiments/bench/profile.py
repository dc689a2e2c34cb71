"""The time of a training step by part: products of weights, attention, recurrent mixers, and the rest.

Every operator of a profiled step belongs to one part, by itself or by the operator that called it: a product inside of
attention is attention. Ours and transformers' model of the same weights are shown beside each other.
"""

import itertools
import sys
from collections import Counter

import pandas as pd
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from experiments.bench.models import Side, pair, training
from experiments.bench.report import check_known, environment, in_words, markdown, write
from experiments.harness.identity import plain

PARTS = {
    "attention": ("scaled_dot_product", "flash_attention", "archipelago::attention", "archipelago::sparse_attention"),
    "mixer": ("archipelago::", "aten::convolution", "aten::_convolution", "convolution_backward"),
    "projections": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "aten::_grouped_mm"),
    "optimiser": ("_fused_adamw", "Optimizer"),
}
REST = "rest"


def part_of(event) -> str:
    """Return the part of an operator: that of the outermost of its callers that has one, else its own."""
    found = REST
    while event is not None:
        found = next((part for part, names in PARTS.items() if any(name in event.name for name in names)), found)
        event = event.cpu_parent
    return found


def seconds_by_part(side: Side, precision: str, steps: int, **sizes: int) -> dict[str, float]:
    """Return the CPU seconds of a training step by part, the mean of `steps` after one that is not counted."""
    work = training(side, **sizes)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        next(work)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                next(work)
    seconds = Counter()
    for event in profiler.events() or ():
        seconds[part_of(event)] += event.self_cpu_time_total / 1e6 / steps
    return dict(seconds)


def bench(config: DictConfig) -> None:
    """Profile training of the config's models in its precisions; print, and write after every model.

    Raises:
        ValueError: for a model without a shape, or models that differ.
    """
    check_known("shape", config.models, config.shapes)
    rows, text = [], ""
    where = environment("cpu") | {"steps": config.rounds}
    sizes = {"batch": config.train.batches[0], "length": config.train.lengths[0]}
    for name, precision in itertools.product(config.models, config.precisions):
        shape = plain(config.common) | plain(config.shapes[name])
        for side, model in pair(shape).items():
            seconds = seconds_by_part(model, precision, config.rounds, **sizes, vocabulary=shape["vocab_size"])
            whole = sum(seconds.values())
            shares = {part: f"{seconds.get(part, 0) / whole:.0%}" for part in (*PARTS, REST)}
            rows.append({"model": name, "precision": precision, "side": side, "ms": round(whole * 1e3)} | shares)
            print(rows[-1], file=sys.stderr, flush=True)
            frame = pd.DataFrame(rows)
            sized = ", ".join(f"{key} {value}" for key, value in sizes.items())
            text = f"{in_words(where)}\n\nCPU time of a training step, {sized}.\n\n{markdown(frame)}"
            write(config.out, "cpu", text, where, frame)
    print(text)
