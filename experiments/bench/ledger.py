"""Bytes and launches of the Triton kernels, counted from the launches themselves, beside the roofline and the peers.

The kernels run in Triton's interpreter on small problems, forward and backward. Of every launch is counted which
elements of which tensors it loads and stores: each counts once per launch ("from memory", what remains where the cache
catches every second reading), and as often as a program asks for it ("asked for"). PyTorch's own operations between
the kernels are launches too, of the bytes of their inputs and outputs.

What a launch moves is a polynomial: of the second degree at most in the tokens, of the first in each of the other
sizes; where an operation takes its tokens in blocks one after the other, of the first in their number and in the tokens
of one. It is found at three lengths and two of every other size, checked at a further one of each, and evaluated at the
published shape. What hangs on data is no polynomial of sizes: `countable.py` says what data is counted. Block sizes are
those for an H200. No GPU is needed, and none can change the count.
"""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple, cast
from unittest import mock

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from experiments.bench.countable import COUNTABLE
from experiments.bench.operations import DTYPES
from experiments.bench.report import check_known, environment, in_words, markdown, write

CAPABILITY = (9, 0)  # of the GPU for which kernels choose their blocks


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

    PAGE = 1 << 20  # bytes

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.asked, self._pages = 0, {}

    def add(self, pointers, mask) -> None:
        """Take in the elements that the mask allows. pointers, mask: handles of the interpreter, of equal shapes."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        wanted = mask.data.astype(bool)  # of a scalar and a tensor together the interpreter makes integers
        at = np.broadcast_to(pointers.data, wanted.shape)[wanted]
        self.asked += at.size * size
        if not at.size:
            return
        pages = at // self.PAGE
        for page in range(int(pages.min()), int(pages.max()) + 1):
            here = at[pages == page] % self.PAGE
            if here.size:
                if (page, size) not in self._pages:
                    self._pages[page, size] = np.zeros(self.PAGE, bool)
                self._pages[page, size][here] = True

    @property
    def different(self) -> int:
        """The bytes at different addresses."""
        return sum(size * int(touched.sum()) for (_, size), touched in self._pages.items())


def held(x: object) -> int:
    """Return the bytes of the different elements of a tensor; 0 for what is none."""
    if not isinstance(x, torch.Tensor):
        return 0
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return int(np.prod(sizes, dtype=np.int64)) * x.element_size() if x.numel() else 0


def counted(name: str, tokens: int, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, list]:
    """Return the rows of `Recorder` of a forward and, where there are gradients, of a backward pass, by the name of the
    pass; each with a row LEAST: the bytes of what the pass takes and gives, every element once."""
    countable = COUNTABLE[name]
    operation = countable.operation
    arguments = {key: sizes[key] for key in countable.arguments}
    sizes = {key: value for key, value in sizes.items() if key not in arguments}
    problem = countable.problem(tokens, **sizes, generator=torch.Generator().manual_seed(0))
    inputs = {name: x for name, x in problem.items() if not name.startswith("initial")}
    leaves = operation.leaves(inputs, "cpu", dtype, operation.differentiable)
    with Recorder() as forward, forward.of_triton():
        found = operation.run(**leaves, **arguments, backend="triton")
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    forward.rows.append(least(*leaves.values(), *outputs))
    if not operation.differentiable:
        return {"forward": forward.rows}
    given, wanted = torch.ones_like(outputs[0]), [x for x in leaves.values() if x.requires_grad]
    with Recorder() as backward, backward.of_triton():
        gradients = torch.autograd.grad(outputs[0], wanted, given, allow_unused=True)
    backward.rows.append(least(*leaves.values(), given, *gradients))
    return {"forward": forward.rows, "backward": backward.rows}


LEAST = "at least"


def least(*tensors: torch.Tensor | None) -> tuple[str, int, int]:
    moved = sum(held(x) for x in tensors)
    return LEAST, moved, moved


def totals(rows: list[tuple[str, int, int]]) -> dict[str, Moved]:
    """Return what the launches of each name move together."""
    launches, memory, asked = Counter(), Counter(), Counter()
    for name, once, again in rows:
        launches[name] += 1
        memory[name] += once
        asked[name] += again
    return {name: Moved(launches[name], memory[name], asked[name]) for name in launches}


@mock.patch("kernels.common.launch.capability", lambda x: CAPABILITY)
def at_published(shape: dict) -> dict[str, dict[str, Moved]]:
    """Return by pass and by name of a launch what it moves at the published shape.

    Args:
        shape: an entry of `shapes` of the config: operation, dtype, length, other sizes, and in `smallest` the sizes of
            the smallest problem, those that grow together in one mapping: the least common multiples of the kernels'
            blocks will do.

    Raises:
        ValueError: where the sizes are no multiples of the smallest, or the counts follow no polynomial.
    """
    name, dtype, smallest = shape["operation"], DTYPES[shape["dtype"]], shape["smallest"]
    sizes = {k: v for k, v in shape.items() if k not in ("name", "operation", "dtype", "smallest", "peers")}
    multiples = []
    for group in smallest:
        found = {key: sizes[key] / n for key, n in group.items()}
        multiples.append(next(iter(found.values())))
        if len(set(found.values())) > 1:
            raise ValueError(f"{name}: {found} are the multiples of `smallest`; they must be one number")
    blocks = COUNTABLE[name].blocks
    degrees = [2 if "length" in group and blocks is None else 1 for group in smallest]
    if blocks is not None:  # `length` is then that of a block: on average, and what is linear in it needs no more
        many = -(-sizes["length"] // blocks.size(shape))
        multiples = [x / many if "length" in group else x for x, group in zip(multiples, smallest, strict=True)]
        multiples, degrees = [*multiples, many], [*degrees, 1]
    points = list(itertools.product(*(range(1, 2 + n) for n in degrees)))
    further = [tuple(n + 2 if i == j else 1 for j in range(len(degrees))) for i, n in enumerate(degrees)]
    moved = []
    for point in points + further:
        grown = sizes | {key: n * by for by, group in zip(point, smallest, strict=False) for key, n in group.items()}
        tokens = grown.pop("length")
        if blocks is None:
            passes = counted(name, tokens, grown, dtype)
        else:
            with mock.patch(blocks.function, return_value=tokens):
                passes = counted(name, tokens * point[-1], grown, dtype)
        moved.append({passed: totals(rows) for passed, rows in passes.items()})
    powers = list(itertools.product(*(range(1 + n) for n in degrees)))
    terms = lambda x: np.prod(np.array(x, float) ** np.array(powers).reshape(len(powers), len(x)), axis=1)  # noqa: E731
    matrix, wanted = np.array([terms(point) for point in points + further]), terms(multiples)
    result = {}
    for passed, launches in moved[0].items():
        for launch in launches:
            values = np.array([x[passed].get(launch, Moved(0, 0, 0)) for x in moved], float)
            weights = np.linalg.solve(matrix[: len(points)], values[: len(points)])
            if not np.allclose(matrix @ weights, values, rtol=1e-6, atol=0.5):
                raise ValueError(
                    f"{launch} of {name} moves {values[len(points) :].tolist()} at {further} times the smallest sizes, "
                    f"its polynomial says {(matrix[len(points) :] @ weights).tolist()}: enlarge `smallest`"
                )
            result.setdefault(passed, {})[launch] = Moved(*(wanted @ weights).round().tolist())
    return result


PYTORCH = "PyTorch's own"


def by_launch(shape: dict) -> list[dict]:
    """Return one row per pass and Triton kernel, one for PyTorch's own launches of the pass, one for all of it, and one
    of what it must move at least, in no launch."""
    found = at_published(shape)
    rows = []
    for passed, launches in found.items():
        least = launches.pop(LEAST)._replace(launches=0)
        ours = {name: moved for name, moved in launches.items() if "::" not in name}
        others = [moved for name, moved in launches.items() if "::" in name]
        parts = ours | ({PYTORCH: summed(others)} if others else {})
        for name, moved in (parts | {"all": summed(parts.values()), LEAST: least}).items():
            rows.append({"operation": name_of(shape), "pass": passed, "launch": name, **moved._asdict()})
    return rows


def name_of(shape: dict) -> str:
    return shape.get("name", shape["operation"])


def summed(moved: Iterable[Moved]) -> Moved:
    return Moved(*(sum(parts) for parts in zip(*moved, strict=True)))


def report(rows: list[dict], shapes: list[dict], config: DictConfig, where: dict) -> tuple[pd.DataFrame, str]:
    """Return the rows as a frame, and in Markdown: whole passes beside the peers' bytes, then every launch."""
    frame = pd.DataFrame(rows)
    rate = config.terabytes_per_second * 1e12
    said = lambda bytes: f"{bytes / 1e6:.0f} MB, {bytes / rate * 1e3:.3f} ms"  # noqa: E731
    whole, of_least = [], frame[frame["launch"] == LEAST].set_index(["operation", "pass"])["memory"]
    for row in frame[frame["launch"] == "all"].to_dict("records"):
        shape = next(shape for shape in shapes if name_of(shape) == row["operation"])
        countable = COUNTABLE[shape["operation"]]
        flops = countable.flops(shape["length"], shape) * countable.products[row["pass"]]
        peers = {name: passes[row["pass"]] for name, passes in shape.get("peers", {}).items() if row["pass"] in passes}
        whole.append({
            "operation": row["operation"],
            "pass": row["pass"],
            "launches": f"{row['launches']:.0f}",
            "at least": said(of_least[row["operation"], row["pass"]]),
            "from memory": said(row["memory"]),
            "asked for": f"{row['asked'] / 1e6:.0f} MB",
            "arithmetic": f"{flops / 1e9:.1f} GFLOP, {flops / config.teraflops_per_second / 1e9:.3f} ms",
            "peers": "; ".join(f"{name} {said(1e6 * megabytes)}" for name, megabytes in peers.items()),
        })  # fmt: skip
    each = frame[~frame["launch"].isin(["all", LEAST])].copy()
    each["launches"] = each["launches"].map("{:.0f}".format)
    for column in ("memory", "asked"):
        each[column] = (each[column] / 1e6).map("{:.1f} MB".format)
    sizes = "\n".join(
        f"- {name_of(shape)}: "
        + ", ".join(f"{k} {v}" for k, v in shape.items() if k not in ("name", "operation", "smallest", "peers"))
        for shape in shapes
    )
    return (
        frame,
        f"""{in_words(where)}

Counted from the launches in Triton's interpreter, with the blocks for an H200; nothing is timed. at least: what the
pass takes and gives, every element once; from memory: every element of a tensor once per launch and direction; asked
for: as often as the programs load and store it. Milliseconds are what these bytes take at
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
    check_known("operation", [shape["operation"] for shape in shapes], COUNTABLE)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("launches are counted in Triton's interpreter: start again with TRITON_INTERPRET=1")
    rows, text, where = [], "", environment("cpu")
    for shape in shapes:
        print(f"{name_of(shape)}: counting", file=sys.stderr, flush=True)
        rows += by_launch(shape)
        frame, text = report(rows, shapes[: shapes.index(shape) + 1], config, where)
        write(config.out, "cpu", text, where, frame)
    print(text)
