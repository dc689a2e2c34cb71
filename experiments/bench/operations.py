"""Speed of our operations beside the same operations elsewhere, in one run on this machine.

Every side is checked first, outputs and gradients, against the recurrence in float64, and only what is right is
timed. The sides take turns on inputs that rotate; on a GPU each runs as a CUDA graph. Medians are shown, with the
ratio to ours.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.bench import peers
from experiments.bench.report import check_known, environment, in_words, markdown, write
from kernels import (
    causal_conv1d_flops,
    convolution,
    cross_entropy,
    delta,
    gated_delta_rule_flops,
    grouped,
    grouped_matmul_flops,
    linear_cross_entropy_flops,
    sparse,
    sparse_attention_flops,
    ssd_flops,
    state_space,
)
from kernels.common.operation import Operation
from kernels.common.trial import TOKENS, TOLERANCE, error_against_reference

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


class Contest(NamedTuple):
    """An operation and what it is raced against.

    Attributes:
        operation: ours.
        peers: device, decoding or not -> functions of the same inputs by library.
        flops: tokens and shape -> FLOPs of a forward pass.
    """

    operation: Operation
    peers: Callable[[str, bool], peers.Sides]
    flops: Callable[[int, dict], int]


CONTESTS = {
    "gated_delta_rule": Contest(
        delta.OPERATION,
        peers.delta_peers,
        lambda T, s: s["batch"] * gated_delta_rule_flops(T, s["heads"], s["head_dim"], s["head_dim"]),
    ),
    "ssd": Contest(
        state_space.OPERATION,
        peers.ssd_peers,
        lambda T, s: s["batch"] * ssd_flops(T, s["heads"], s["groups"], s["head_dim"], s["state_size"]),
    ),
    "causal_conv1d": Contest(
        convolution.OPERATION,
        peers.conv_peers,
        lambda T, s: s["batch"] * causal_conv1d_flops(T, s["channels"], 4),
    ),
    "sparse_attention": Contest(
        sparse.OPERATION,
        peers.sparse_peers,
        lambda T, s: s["batch"] * sparse_attention_flops(T, s["heads"], s["head_dim"], s["head_dim"], s["picked"]),
    ),
    "latent_attention": Contest(
        sparse.LATENT_OPERATION,
        peers.latent_peers,
        lambda T, s: s["batch"] * sparse_attention_flops(T, s["heads"], s["head_dim"], s["value_dim"], s["picked"]),
    ),
    "grouped_matmul": Contest(
        grouped.OPERATION,
        peers.grouped_peers,
        lambda T, s: grouped_matmul_flops(s["batch"] * T, s["width"], s["outputs"]),
    ),
    "linear_cross_entropy": Contest(
        cross_entropy.OPERATION,
        peers.head_peers,
        lambda T, s: linear_cross_entropy_flops(s["batch"] * T, s["width"], s["vocabulary"]),
    ),
}


def random_inputs(operation: Operation, T: int, sizes: dict, decode: bool) -> dict[str, Tensor]:
    """Return a random problem. Decoding goes on from a state; the rest starts without one, as training does."""
    inputs = operation.random_problem(T, **sizes)
    return {name: x for name, x in inputs.items() if decode or not name.startswith("initial")}


def runner(side: Callable, inputs: list[dict[str, Tensor]], mode: str) -> Callable[[], None]:
    """Return a pass over every set of inputs."""

    def run() -> None:
        for x in inputs:
            if mode == "forward+backward":
                o = side(**x)
                leaves = [leaf for leaf in x.values() if leaf.requires_grad]
                torch.autograd.grad(o, leaves, torch.ones_like(o), allow_unused=True)
            else:
                with torch.no_grad():
                    side(**x)

    return run


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """Return the same work as a CUDA graph, so that launches cost nothing; as it is, and said, where it cannot be
    captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        print(f"not captured as a CUDA graph, timed with its launches: {error}", file=sys.stderr)
        return run
    return graph.replay


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds that a run takes."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings(device: str, dtypes: list[str]) -> dict[str, float]:
    """Return what this device reaches here: TFLOP/s of a square matrix product by dtype (on a CPU in float32, in
    which the operations compute there), and GB/s of a copy (read and written)."""
    size = 8192 if device == "cuda" else 2048
    found = {}
    for name in dtypes if device == "cuda" else ["float32"]:
        a = torch.randn(size, size, device=device).to(DTYPES[name])
        found[name] = 2 * size**3 / min(seconds(lambda a=a: a @ a, device) for _ in range(5)) / 1e12
    x = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return found | {"copy GB/s": 2 * x.nbytes / min(seconds(lambda: y.copy_(x), device) for _ in range(5)) / 1e9}


def race(name: str, mode: str, shape: dict, dtype: str, config: DictConfig, device: str, peaks: dict) -> list[dict]:
    """Return one row per side, ours first."""
    contest, decode, both = CONTESTS[name], mode == "decode", mode == "forward+backward"
    operation, kind = contest.operation, DTYPES[dtype]
    T, sizes = shape.get("length", 1), {key: value for key, value in shape.items() if key != "length"}
    backends = list(config.backends or ({"cuda": ["triton", "torch"]}.get(device, ["torch"])))
    if decode and device == "cpu" and config.backends is None:
        backends = ["auto"]
    if T <= config.naive_up_to and not decode:
        backends.append("reference")
    sides = {f"ours, {backend}": operation.on_backend(backend) for backend in backends}
    sides |= contest.peers(device, decode)
    row = {"operation": name, "mode": mode, "shape": " ".join(f"{k}={v}" for k, v in shape.items()), "dtype": dtype}
    rows, runs = [], {}
    torch.manual_seed(1)
    checked = random_inputs(operation, min(T, TOKENS), sizes, decode)
    inputs = [
        operation.leaves(random_inputs(operation, T, sizes, decode), device, kind, both) for _ in range(config.rotate)
    ]
    for side, call in sides.items():
        rows.append(row | {"side": side, "error": None, "ms": None})
        try:
            if side != peers.ATTENTION:
                rows[-1]["error"] = error_against_reference(call, operation, checked, device, kind, both)
            if side == peers.ATTENTION or rows[-1]["error"] <= TOLERANCE[kind]:
                run = runner(call, inputs, mode)
                run()
                runs[side] = graphed(run) if device == "cuda" else run
        except Exception as failure:  # of another's kernels, for one: the others go on
            rows[-1]["side"] = f"{side}: {type(failure).__name__}"
            print(f"{side} failed on {rows[-1]}: {failure}", file=sys.stderr)
    taken = {side: [] for side in runs}
    for _ in range(config.rounds):
        for side, run in runs.items():
            taken[side].append(seconds(run, device) / config.rotate)
    medians = {side: statistics.median(times) for side, times in taken.items()}
    ours = medians.get(next(iter(sides)))
    moved = sum(x.nbytes * (2 if name.startswith("initial") else 1) for name, x in inputs[0].items())
    flops = contest.flops(T, shape) * (3 if both else 1)
    peak = peaks[dtype if device == "cuda" else "float32"]
    for r in rows:
        if r["side"] in medians:
            t = medians[r["side"]]
            r |= {"ms": t * 1e3, "to ours": None if ours is None else t / ours}
            if r["side"] != peers.ATTENTION:
                r |= {"TFLOP/s": flops / t / 1e12, "of matmul": flops / t / 1e12 / peak}
                r |= {"of copy": moved / t / 1e9 / peaks["copy GB/s"]}
    return rows


FORMATS = {
    "error": "{:.1e}",
    "ms": "{:.3g}",
    "to ours": "{:.2f}",
    "TFLOP/s": "{:.3g}",
    "of matmul": "{:.0%}",
    "of copy": "{:.0%}",
}


def report(rows: list[dict], where: dict) -> tuple[pd.DataFrame, str]:
    """Return the rows so far as a frame, and as a text in Markdown."""
    frame = pd.DataFrame(rows, columns=["operation", "mode", "shape", "dtype", "side", *FORMATS])
    frame = frame.astype(dict.fromkeys(FORMATS, float))
    cells = frame.copy()
    for column, form in FORMATS.items():
        cells[column] = ["" if pd.isna(x) else form.format(x) for x in frame[column]]
    cells["ms"] = cells["ms"].mask(frame["ms"].isna(), "not timed")
    reached = ", ".join(f"{name} {value:.3g}" for name, value in where["ceilings"].items())
    return (
        frame,
        f"""{in_words(where)}

Measured here: TFLOP/s of matrix products and copy: {reached}.

error: root mean square against the recurrence in float64, of output or gradient, whichever is worse; a side that errs
more than rounding can is not timed. to ours: time as a multiple of ours (first line of a group). of matmul, of copy:
fraction of those ceilings, by the operation's own count of FLOPs (a backward pass as two forward ones) and by the
bytes of its inputs and of the state it writes.

{markdown(cells)}""",
    )


def bench(config: DictConfig) -> None:
    """Race everything that the config names for the device that is here; print, and write after every race.

    Raises:
        ValueError: for an operation or a dtype that is not known.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [contest.operation for contest in config.races[device]]
    check_known("operation", names, CONTESTS)
    check_known("dtype", config.dtypes, DTYPES)
    where = environment(device) | {"rounds": config.rounds, "ceilings": ceilings(device, list(config.dtypes))}
    rows, text = [], ""
    for asked in config.races[device]:
        shape = {k: v for k, v in asked.items() if k not in ("operation", "modes", "lengths")}
        for length, mode, dtype in itertools.product(asked.get("lengths", [1]), asked.modes, config.dtypes):
            sized = shape if mode == "decode" else shape | {"length": length}
            print(f"{asked.operation} {mode} {sized} {dtype}", file=sys.stderr, flush=True)
            rows += race(asked.operation, mode, sized, dtype, config, device, where["ceilings"])
            frame, text = report(rows, where)
            write(config.out, device, text, where, frame)
    print(text)
