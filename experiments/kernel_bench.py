"""Speed of our recurrent operations beside the same operations elsewhere, in one run on this machine.

python -m experiments.bench kernels=recurrent kernels.out=kernels/recurrent_cpu

Every side is checked first, outputs and gradients, against the recurrence in float64, and only what is right is timed. The
sides take turns on inputs that rotate; on a GPU each runs as a CUDA graph. Medians are shown, with the ratio to ours.
"""

import importlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from experiments.harness.hardware import device_name
from kernels.causal_conv1d.torch import causal_conv1d_flops
from kernels.gated_delta_rule.torch import gated_delta_rule_flops
from kernels.ssd.torch import ssd_flops
from kernels.trial import INPUTS, TOKENS, WRONG, error_of, leaves, on_backend

ATTENTION = "attention (another function)"  # there for its time alone


class Operation(NamedTuple):
    """peers: functions of the same inputs by library, of those installed, for a device and whether to decode. flops: of a
    forward pass over (tokens, shape)."""

    peers: Callable[[str, bool], dict[str, Callable[..., Tensor]]]
    flops: Callable[[int, dict], int]


def imported(module: str, name: str):
    """A function of a package that may not be there, or None."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # packages that are built for a GPU fail in many ways without one
        return None


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def present(sides: dict) -> dict:
    return {name: side for name, side in sides.items() if side is not None}


def delta_peers(device: str, decode: bool) -> dict:
    name = "fused_recurrent_gated_delta_rule" if decode else "chunk_gated_delta_rule"
    theirs = "torch_recurrent_gated_delta_rule" if decode else "torch_chunk_gated_delta_rule"
    fla = imported("fla.ops.gated_delta_rule", name) if device == "cuda" else None
    hf = imported("transformers.models.qwen3_next.modeling_qwen3_next", theirs)

    def run(f, q, k, v, g, beta, initial_state=None):
        if f is hf and v.shape[2] > q.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], dim=2) for x in (q, k))
        return f(q, k, v, g=g, beta=beta, initial_state=initial_state, output_final_state=decode)[0]

    def attention(q, k, v, g, beta):
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    sides = {"flash-linear-attention": fla and partial(run, fla), "transformers": hf and partial(run, hf)}
    return present(sides | {ATTENTION: None if decode else attention})


def ssd_peers(device: str, decode: bool) -> dict:
    module = "transformers.models.mamba2.modeling_mamba2"
    if decode:
        step = imported("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
        sides = {"mamba-ssm": step if device == "cuda" else None}
        sides["transformers"] = imported(module, "mamba2_selective_state_update")

        def update(f, x, dt, A, B, C, D, initial_states):
            P, N = initial_states.shape[2:]
            A, D = A[:, None, None].expand(-1, P, N), D[:, None].expand(-1, P)
            dt = dt[:, 0, :, None].expand(-1, -1, P)
            if f is sides["transformers"]:
                dt, A = dt[..., :1], A[..., :1]
            return f(initial_states.clone(), x[:, 0], dt, A, B[:, 0], C[:, 0], D)[:, None]

        return present({name: f and partial(update, f) for name, f in sides.items()})
    chunks = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined") if device == "cuda" else None
    hf = imported(module, "mamba2_chunk_scan")

    def scan(f, chunk_size, x, dt, A, B, C, D):
        found = f(x, dt, A, B, C, chunk_size, D=D)
        return found[0] if isinstance(found, tuple) else found

    sides = {"mamba-ssm": chunks and partial(scan, chunks, 256), "transformers": hf and partial(scan, hf, 64)}
    return present(sides)


def conv_peers(device: str, decode: bool) -> dict:
    if decode:
        return {}
    cuda = imported("causal_conv1d", "causal_conv1d_fn") if device == "cuda" else None
    hf = imported("transformers.models.mamba2.modeling_mamba2", "causal_conv1d_fn")
    run = lambda f, x, weight, bias: f(x.mT, weight, bias, activation="silu").mT  # noqa: E731
    return present({"causal-conv1d": cuda and partial(run, cuda), "transformers": hf and partial(run, hf)})


OPERATIONS = {
    "gated_delta_rule": Operation(
        delta_peers,
        lambda T, s: s["batch"] * gated_delta_rule_flops(T, s["heads"], s["head_dim"], s["head_dim"]),
    ),
    "ssd": Operation(
        ssd_peers,
        lambda T, s: s["batch"] * ssd_flops(T, s["heads"], s["groups"], s["head_dim"], s["state_size"]),
    ),
    "causal_conv1d": Operation(
        conv_peers,
        lambda T, s: s["batch"] * causal_conv1d_flops(T, s["channels"], 4),
    ),
}


def random_inputs(name: str, T: int, shape: dict, decode: bool) -> dict[str, Tensor]:
    """Decoding goes on from a state; the rest starts without one, as training does."""
    inputs = INPUTS[name](T, **shape)
    return {key: x for key, x in inputs.items() if decode or not key.startswith("initial")}


def runner(side: Callable, inputs: list[dict[str, Tensor]], mode: str) -> Callable[[], None]:
    """One pass over every set of inputs."""

    def run() -> None:
        for x in inputs:
            if mode == "forward+backward":
                o = side(**x)
                torch.autograd.grad(o, list(x.values()), torch.ones_like(o), allow_unused=True)
            else:
                with torch.no_grad():
                    side(**x)

    return run


def graphed(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph, so that launches cost nothing; as it is, and said, where it cannot be captured."""
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


def seconds(run: Callable[[], None], device: str) -> float:
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


def ceilings(device: str, dtypes: list[torch.dtype]) -> dict[str, float]:
    """What this device reaches here: TFLOP/s of a square matrix product by dtype (on a CPU in float32, in which the operations
    compute there), and GB/s of a copy (read and written)."""
    size = 8192 if device == "cuda" else 2048
    best = lambda run: min(seconds(run, device) for _ in range(5))  # noqa: E731
    found = {}
    for dtype in dtypes if device == "cuda" else [torch.float32]:
        a = torch.randn(size, size, device=device).to(dtype)
        found[named(dtype)] = 2 * size**3 / best(lambda a=a: a @ a) / 1e12
    x = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return found | {"copy GB/s": 2 * x.nbytes / best(lambda: y.copy_(x)) / 1e9}


def race(
    name: str, mode: str, shape: dict, dtype: torch.dtype, config: DictConfig, device: str, peaks: dict
) -> list[dict]:
    """A row a side, ours first."""
    op, decode, both = OPERATIONS[name], mode == "decode", mode == "forward+backward"
    T, sizes = shape.get("length", 1), {key: value for key, value in shape.items() if key != "length"}
    backends = list(config.backends or ({"cuda": ["triton", "torch"]}.get(device, ["torch"])))
    if decode and device == "cpu" and config.backends is None:
        backends = ["auto"]
    if T <= config.naive_up_to and not decode:
        backends.append("reference")
    sides = {f"ours, {backend}": on_backend(name, backend) for backend in backends} | op.peers(device, decode)
    row = {"operation": name, "mode": mode} | {"shape": " ".join(f"{k}={v}" for k, v in shape.items())}
    row["dtype"] = named(dtype)
    peak = peaks[named(dtype) if device == "cuda" else "float32"]
    rows, runs = [], {}
    torch.manual_seed(1)
    checked = random_inputs(name, min(T, TOKENS), sizes, decode)
    inputs = [leaves(random_inputs(name, T, sizes, decode), device, dtype, both) for _ in range(config.rotate)]
    for side, call in sides.items():
        rows.append(row | {"side": side, "error": None, "ms": None})
        try:
            if side != ATTENTION:
                rows[-1]["error"] = error_of(call, name, checked, device, dtype, both)
            if side == ATTENTION or rows[-1]["error"] <= WRONG[dtype]:
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
    moved = sum(x.nbytes for x in inputs[0].values()) + sum(
        x.nbytes for n, x in inputs[0].items() if n.startswith("initial")
    )
    flops = op.flops(T, shape) * (3 if mode == "forward+backward" else 1)
    for r in rows:
        if r["side"] in medians:
            t = medians[r["side"]]
            r |= {"ms": t * 1e3, "to ours": None if ours is None else t / ours}
            if r["side"] != ATTENTION:
                r |= {"TFLOP/s": flops / t / 1e12, "of matmul": flops / t / 1e12 / peak}
                r |= {"of copy": moved / t / 1e9 / peaks["copy GB/s"]}
    return rows


def table(rows: pd.DataFrame) -> str:
    """Markdown."""
    cells = rows.copy()
    shown = {
        "error": "{:.1e}",
        "ms": "{:.3g}",
        "to ours": "{:.2f}",
        "TFLOP/s": "{:.3g}",
        "of matmul": "{:.0%}",
        "of copy": "{:.0%}",
    }
    for column, form in shown.items():
        cells[column] = [form.format(x) if x == x else "" for x in rows[column]]
    cells["ms"] = cells["ms"].mask(rows["ms"].isna(), "not timed")
    lines = [list(cells.columns), ["---"] * cells.shape[1], *cells.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


NUMBERS = ["error", "ms", "to ours", "TFLOP/s", "of matmul", "of copy"]


def report(rows: list[dict], where: dict, out: str | None) -> str:
    """The rows so far in Markdown; written to <out>.md, and to <out>.json with the machine, unless out is None."""
    frame = pd.DataFrame(rows, columns=["operation", "mode", "shape", "dtype", "side", *NUMBERS])
    frame[NUMBERS] = frame[NUMBERS].astype(float)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    ceilings = ", ".join(f"{name} {value:.3g}" for name, value in where["ceilings"].items())
    text = f"""{where["device"]}, Python {where["python"]}, {versions}, {where["date"]}. `{where["command"]}`

Measured here: TFLOP/s of matrix products and copy: {ceilings}.

error: root mean square against the recurrence in float64, of output or gradient, whichever is worse; a side that errs more than
rounding can is not timed. to ours: time as a multiple of ours (first line of a group). of matmul, of copy: share of those
ceilings, by the operation's own count of FLOPs (a backward pass as two forward ones) and by the bytes of its inputs and of the
state it writes.

{table(frame)}"""
    if out is not None:
        Path(f"{out}.md").write_text(text)
        found = where | {"rows": json.loads(frame.to_json(orient="records"))}
        Path(f"{out}.json").write_text(json.dumps(found, indent=1) + "\n")
    return text


def bench(config: DictConfig) -> None:
    """Races everything that the config names for the device that is here; prints, and writes after every race."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [getattr(torch, name) for name in config.dtypes]
    packages = ("torch", "triton", "transformers", "flash-linear-attention", "mamba-ssm", "causal-conv1d")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    where = {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in packages if name in installed},
        "date": date.today().isoformat(),
        "command": "python -m experiments.bench " + " ".join(sys.argv[1:]),
        "rounds": config.rounds,
        "ceilings": ceilings(device, dtypes),
    }
    rows, text = [], ""
    for race_ in config.races[device]:
        shape = {k: v for k, v in race_.items() if k not in ("operation", "modes", "lengths")}
        for length, mode, dtype in itertools.product(race_.get("lengths", [1]), race_.modes, dtypes):
            sized = shape if mode == "decode" else shape | {"length": length}
            print(f"{race_.operation} {mode} {sized} {named(dtype)}", file=sys.stderr, flush=True)
            rows += race(race_.operation, mode, sized, dtype, config, device, where["ceilings"])
            text = report(rows, where, config.out)
    print(text)
