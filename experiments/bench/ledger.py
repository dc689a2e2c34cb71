"""Bytes and launches of the Triton kernels, counted from the launches themselves, beside the roofline and the peers.

The kernels run in Triton's interpreter on small problems, forward and backward. Of every launch is counted which
elements of which tensors it loads and stores: each counts once per launch ("from memory", what remains where the cache
catches every second reading), and as often as a program asks for it ("asked for"). PyTorch's own operations between
the kernels are launches too, of the bytes of their inputs and outputs.

What a launch moves is a polynomial: of the second degree at most in the tokens, of the first in the heads. It is found
at three lengths and two numbers of heads, checked at a further one of each, and evaluated at the published shape. No
GPU is needed, and none can change the count.
"""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple, cast
from unittest import mock

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from experiments.bench.operations import CONTESTS, DTYPES
from experiments.bench.report import check_known, environment, in_words, markdown, write
from kernels import delta_step, gated_delta_step_flops
from kernels.common.operation import Operation

# What can be counted, with its forward FLOPs by tokens and shape.
OPERATIONS: dict[str, tuple[Operation, Callable[[int, dict], float]]] = {
    **{name: (contest.operation, contest.flops) for name, contest in CONTESTS.items()},
    "gated_delta_step": (
        delta_step.OPERATION,
        lambda T, s: s["batch"] * gated_delta_step_flops(s["heads"], s["key_heads"], s["head_dim"], s["value_dim"]),
    ),
}
LENGTHS, MULTIPLES = (1, 2, 3), (1, 2)  # of the smallest problem, at which the polynomial is found
FURTHER = (4, 1), (1, 3)  # where it is checked


class Moved(NamedTuple):
    """Bytes that launches move.

    Attributes:
        launches: how many there are.
        memory: bytes, every element of a tensor once per launch and direction.
        asked: bytes that the programs load and store; of PyTorch's own operations as `memory`.
    """

    launches: float
    memory: float
    asked: float


class Recorder(TorchDispatchMode):
    """A record of the launches while it is entered, in order.

    Attributes:
        rows: (name, bytes from memory, bytes asked for) of every launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "archipelago":  # what its body launches counts, not itself
            with self:
                return torch._library.custom_ops.OPDEFS[func.name()]._init_fn(*args, **kwargs)
        found = func(*args, **kwargs)
        if not (func.is_view or "empty" in func.name()):
            moved = sum(held(x) for x in torch.utils._pytree.tree_leaves((args, kwargs, found)))
            self.rows.append((func.name(), moved, moved))
        return found

    @contextmanager
    def of_triton(self):
        """Record the launches of Triton kernels too."""
        from triton.runtime import interpreter

        launch, builder = interpreter.InterpretedFunction.run, interpreter.InterpreterBuilder
        loads, stores = Accesses(), Accesses()

        def recorded(kernel, *args, **kwargs):
            loads.forget()
            stores.forget()
            with _disable_current_modes(), np.errstate(all="ignore"):
                launch(kernel, *args, **kwargs)
            self.rows.append((kernel.__name__, loads.different + stores.different, loads.asked + stores.asked))

        def load(builder, pointers, mask, other, *hints, inner=builder.create_masked_load):
            loads.add(pointers, mask)
            return inner(builder, pointers, mask, other, *hints)

        def store(builder, pointers, value, mask, *hints, inner=builder.create_masked_store):
            stores.add(pointers, mask)
            return inner(builder, pointers, value, mask, *hints)

        with (
            mock.patch.object(interpreter.InterpretedFunction, "run", recorded),
            mock.patch.object(builder, "create_masked_load", load),
            mock.patch.object(builder, "create_masked_store", store),
        ):
            yield


class Accesses:
    """Addresses that the programs of one launch read, or write."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.asked, self._seen = 0, {}

    def add(self, pointers, mask) -> None:
        """Take in the elements that the mask allows. pointers, mask: handles of the interpreter, of equal shapes."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        wanted = mask.data.astype(bool)  # of a scalar and a tensor together the interpreter makes integers
        at = np.broadcast_to(pointers.data, wanted.shape)[wanted]
        self.asked += at.size * size
        self._seen.setdefault(size, []).append(np.unique(at))

    @property
    def different(self) -> int:
        """The bytes at different addresses."""
        return sum(size * np.unique(np.concatenate(parts)).size for size, parts in self._seen.items())


def held(x: object) -> int:
    """Return the bytes of the different elements of a tensor; 0 for what is none."""
    if not isinstance(x, torch.Tensor):
        return 0
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return int(np.prod(sizes, dtype=np.int64)) * x.element_size() if x.numel() else 0


def counted(operation: Operation, tokens: int, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, list]:
    """Return the rows of `Recorder` of a forward and, where there are gradients, of a backward pass, by the name of the
    pass."""
    problem = operation.random_problem(tokens, **sizes, generator=torch.Generator().manual_seed(0))
    inputs = {name: x for name, x in problem.items() if not name.startswith("initial")}
    leaves = operation.leaves(inputs, "cpu", dtype, operation.differentiable)
    with Recorder() as forward, forward.of_triton():
        o = operation.on_backend("triton")(**leaves)
    if not operation.differentiable:
        return {"forward": forward.rows}
    given = torch.ones_like(o)
    with Recorder() as backward, backward.of_triton():
        torch.autograd.grad(o, [x for x in leaves.values() if x.requires_grad], given, allow_unused=True)
    return {"forward": forward.rows, "backward": backward.rows}


def totals(rows: list[tuple[str, int, int]]) -> dict[str, Moved]:
    """Return what the launches of each name move together."""
    launches, memory, asked = Counter(), Counter(), Counter()
    for name, once, again in rows:
        launches[name] += 1
        memory[name] += once
        asked[name] += again
    return {name: Moved(launches[name], memory[name], asked[name]) for name in launches}


def terms(length: float, multiple: float) -> list[float]:
    return [length**i * multiple**j for i in range(len(LENGTHS)) for j in range(len(MULTIPLES))]


def at_published(shape: dict) -> dict[str, dict[str, Moved]]:
    """Return by pass and by name of a launch what it moves at the published shape.

    Args:
        shape: an entry of `shapes` of the config: operation, dtype, length, other sizes, and in `smallest` the tokens
            and the heads of the smallest problem: the least common multiples of the kernels' chunks will do.

    Raises:
        ValueError: where the sizes are no multiples of the smallest, or the counts follow no polynomial.
    """
    operation, smallest = OPERATIONS[shape["operation"]][0], dict(shape["smallest"])
    fixed = {
        k: v for k, v in shape.items() if k not in ("operation", "dtype", "smallest", "peers", "length", *smallest)
    }
    tokens = smallest.pop("length")
    heads = {name: shape[name] / n for name, n in smallest.items()}
    if len(set(heads.values())) > 1:
        raise ValueError(f"{shape['operation']}: {heads} are the multiples of `smallest`; they must be one number")
    points = [*itertools.product(LENGTHS, MULTIPLES), *FURTHER]
    found = []
    for length, multiple in points:
        sizes = fixed | {name: n * multiple for name, n in smallest.items()}
        passes = counted(operation, tokens * length, sizes, DTYPES[shape["dtype"]])
        found.append({name: totals(rows) for name, rows in passes.items()})
    matrix, known = np.array([terms(*point) for point in points]), len(points) - len(FURTHER)
    wanted = np.array(terms(shape["length"] / tokens, next(iter(heads.values()), 1)))
    result = {}
    for passed, launches in found[0].items():
        for name in launches:
            values = np.array([x[passed].get(name, Moved(0, 0, 0)) for x in found], float)
            weights = np.linalg.solve(matrix[:known], values[:known])
            if not np.allclose(matrix @ weights, values, rtol=1e-6, atol=0.5):
                raise ValueError(
                    f"{name} of {shape['operation']} moves {values[known:].tolist()} at {FURTHER} times the smallest "
                    f"length and heads, its polynomial says {(matrix[known:] @ weights).tolist()}: enlarge `smallest`"
                )
            result.setdefault(passed, {})[name] = Moved(*(wanted @ weights).round().tolist())
    return result


PYTORCH = "PyTorch's own"


def by_launch(shape: dict) -> list[dict]:
    """Return one row per pass and Triton kernel, one for PyTorch's own launches of the pass, and one for all of it."""
    found = at_published(shape)
    rows = []
    for passed, launches in found.items():
        ours = {name: moved for name, moved in launches.items() if "::" not in name}
        others = [moved for name, moved in launches.items() if "::" in name]
        parts = ours | ({PYTORCH: summed(others)} if others else {})
        for name, moved in (parts | {"all": summed(parts.values())}).items():
            rows.append({"operation": shape["operation"], "pass": passed, "launch": name, **moved._asdict()})
    return rows


def summed(moved: Iterable[Moved]) -> Moved:
    return Moved(*(sum(parts) for parts in zip(*moved, strict=True)))


def report(rows: list[dict], shapes: list[dict], config: DictConfig, where: dict) -> tuple[pd.DataFrame, str]:
    """Return the rows as a frame, and in Markdown: whole passes beside the peers' bytes, then every launch."""
    frame = pd.DataFrame(rows)
    rate = config.terabytes_per_second * 1e12
    said = lambda bytes: f"{bytes / 1e6:.0f} MB, {bytes / rate * 1e3:.3f} ms"  # noqa: E731
    whole = []
    for row in frame[frame["launch"] == "all"].to_dict("records"):
        shape = next(shape for shape in shapes if shape["operation"] == row["operation"])
        flops = OPERATIONS[row["operation"]][1](shape["length"], shape) * (1 if row["pass"] == "forward" else 2)
        peers = {name: passes[row["pass"]] for name, passes in shape.get("peers", {}).items() if row["pass"] in passes}
        whole.append({
            "operation": row["operation"],
            "pass": row["pass"],
            "launches": f"{row['launches']:.0f}",
            "from memory": said(row["memory"]),
            "asked for": f"{row['asked'] / 1e6:.0f} MB",
            "arithmetic": f"{flops / 1e9:.1f} GFLOP, {flops / config.teraflops_per_second / 1e9:.3f} ms",
            "peers": "; ".join(f"{name} {said(1e6 * megabytes)}" for name, megabytes in peers.items()),
        })  # fmt: skip
    each = frame[frame["launch"] != "all"].copy()
    each["launches"] = each["launches"].map("{:.0f}".format)
    for column in ("memory", "asked"):
        each[column] = (each[column] / 1e6).map("{:.1f} MB".format)
    sizes = "\n".join(
        f"- {shape['operation']}: "
        + ", ".join(f"{key} {value}" for key, value in shape.items() if key not in ("operation", "smallest", "peers"))
        for shape in shapes
    )
    return (
        frame,
        f"""{in_words(where)}

Counted from the launches in Triton's interpreter; nothing is timed. from memory: every element of a tensor once per
launch and direction; asked for: as often as the programs load and store it. Milliseconds are what these bytes take at
{config.terabytes_per_second} TB/s, and the arithmetic at {config.teraflops_per_second} TFLOP/s, what an H200 reaches
in practice: floors, not times. Bytes of peers: {config.peers}.

{sizes}

{markdown(pd.DataFrame(whole))}
{markdown(each)}""",
    )


def bench(config: DictConfig) -> None:
    """Count what the config names; print, and write after every shape.

    Raises:
        ValueError: for an operation that is not known, and where Triton compiles, so that nothing can be counted.
    """
    shapes = cast(list[dict], OmegaConf.to_container(config.shapes, resolve=True))
    check_known("operation", [shape["operation"] for shape in shapes], OPERATIONS)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("launches are counted in Triton's interpreter: start again with TRITON_INTERPRET=1")
    rows, text, where = [], "", environment("cpu")
    for shape in shapes:
        print(f"{shape['operation']}: counting", file=sys.stderr, flush=True)
        rows += by_launch(shape)
        frame, text = report(rows, shapes[: shapes.index(shape) + 1], config, where)
        write(config.out, "cpu", text, where, frame)
    print(text)
