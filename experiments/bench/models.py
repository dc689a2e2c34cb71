"""Speed of our backbones beside the same models in transformers, on this machine's CPU: training, prefill, decoding.

Both sides have the same shape and the same weights, of which they learn the same: ours is converted from theirs, and
nothing is timed before the two give the same logits. A training step is forward, cross-entropy, backward and AdamW; a
prefill is one pass over a context that leaves a cache and the last logits; decoding goes on from there token by token.
The sides take turns.

Shape letters: B sequences, T tokens, D model width, V token ids.
"""

import inspect
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from archs import checkpoints
from archs.language_model import LanguageModel
from archs.mixers.sparse_attention import Indexer
from experiments.bench.report import check_known, environment, in_words, markdown, write
from experiments.harness.identity import plain
from kernels.hugging_face import import_transformers

MODES = ("train", "prefill", "decode")


class Side(NamedTuple):
    """A model as a race sees it.

    Attributes:
        model: for its parameters.
        logits: tokens [B, T] -> logits [B, T, V].
        go_on: tokens [B, T] and a cache, None before the first -> logits [B, 1, V] of the last, and the cache after.
    """

    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    go_on: Callable[[Tensor, Any], tuple[Tensor, Any]]


def our_side(model: LanguageModel) -> Side:
    """Return one of our models as a race sees it."""

    def go_on(tokens_BT: Tensor, states: list | None) -> tuple[Tensor, list]:
        hidden_BTD, states = model.extend(tokens_BT, states or model.empty_states(len(tokens_BT)))
        return model.logits(hidden_BTD[:, -1:]), states

    return Side(model, model, go_on)


def their_side(model: nn.Module) -> Side:
    """Return a model of transformers as a race sees it."""
    names = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in names else "past_key_values"  # the state of a recurrence, or a cache

    def go_on(tokens_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        found = model(tokens_BT, use_cache=True, logits_to_keep=1, **{name: cache})
        return found.logits[:, -1:], found[name]

    return Side(model, lambda tokens_BT: model(tokens_BT, use_cache=False).logits, go_on)


def pair(shape: dict) -> dict[str, Side]:
    """Return a model of transformers and ours of its weights.

    Raises:
        ValueError: the two do not give the same logits, at once and from a cache, to 1e-3 of their standard deviation.
    """
    transformers = import_transformers()
    torch.manual_seed(0)
    special = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(**shape, **special)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.eval().save_pretrained(folder)
        ours = checkpoints.read(folder)
    for part in ours.modules():
        if isinstance(part, Indexer):
            part.requires_grad_(False)  # theirs has no loss that it learns from
    sides = {"transformers": their_side(theirs), "ours": our_side(ours)}
    tokens_BT = torch.randint(shape["vocab_size"], (2, 100))
    with torch.no_grad():
        expected, found = (side.logits(tokens_BT) for side in sides.values())
        agree(shape, found, expected)
        for side in sides.values():
            before_B1V, cache = side.go_on(tokens_BT[:, :-1], None)
            last_B1V, _ = side.go_on(tokens_BT[:, -1:], cache)
            agree(shape, torch.cat([before_B1V, last_B1V], 1), expected[:, -2:])
    return sides


def agree(shape: dict, found: Tensor, expected: Tensor) -> None:
    """Raise ValueError for logits that differ."""
    off = (found - expected).abs().max() / expected.std()
    if not off < 1e-3:
        raise ValueError(f"{shape['model_type']}: logits differ by {off:.1e} of their standard deviation")


def training(side: Side, batch: int, length: int, vocabulary: int) -> Iterator[int]:
    """Train on random tokens: yield after each step how many tokens it has learned from."""
    side.model.train()
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)
    while True:
        tokens_BT = torch.randint(vocabulary, (batch, length))
        loss = F.cross_entropy(side.logits(tokens_BT)[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield batch * length


def prefilling(side: Side, batch: int, length: int, vocabulary: int) -> Iterator[int]:
    """Read contexts of random tokens: yield after each how many tokens there were."""
    side.model.eval()
    while True:
        side.go_on(torch.randint(vocabulary, (batch, length)), None)
        yield batch * length


def decoding(side: Side, batch: int, length: int, vocabulary: int, tokens: int = 16) -> Iterator[int]:
    """Go on from a context: yield after `tokens` more of each sequence how many that were; the cache grows."""
    side.model.eval()
    _, cache = side.go_on(torch.randint(vocabulary, (batch, length)), None)
    yield 0  # reading the context is none of decoding
    while True:
        for _ in range(tokens):
            _, cache = side.go_on(torch.randint(vocabulary, (batch, 1)), cache)
        yield batch * tokens


WORK = dict(zip(MODES, (training, prefilling, decoding), strict=True))


def race(
    sides: dict[str, Side], mode: str, precision: str, rounds: int, **sizes: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return for each side the median tokens per second over the rounds, and the seconds of the first, which counts
    for nothing else: there a model is compiled."""
    gradients = nullcontext() if mode == "train" else torch.no_grad()
    works = {name: WORK[mode](side, **sizes) for name, side in sides.items()}
    seconds = {name: [] for name in sides}
    with gradients, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        done = 0
        for _ in range(rounds + 1):
            for name, work in works.items():
                started = time.perf_counter()
                done = next(work)
                seconds[name].append(time.perf_counter() - started)
    speeds = {name: done / statistics.median(times[1:]) for name, times in seconds.items()}
    return speeds, {name: times[0] for name, times in seconds.items()}


@contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Have models compiled anew and not found compiled, so that the seconds are those of a first time."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        yield


def rows_of(name: str, precision: str, config: DictConfig) -> Iterator[dict]:
    """Yield one row per race of a model in a precision."""
    shape = plain(config.common) | plain(config.shapes[name])
    for mode in config.modes:
        settings = config[mode]
        ways = settings.compiled if mode == "train" else [False]
        for compiled, batch, length in itertools.product(ways, settings.batches, settings.lengths):
            sides = pair(shape)
            if compiled:
                torch.compiler.reset()
                for side in sides.values():
                    side.model.compile()
            sizes = {"batch": batch, "length": length, "vocabulary": shape["vocab_size"]}
            with empty_compile_cache():
                speeds, first = race(sides, mode, precision, config.rounds, **sizes)
            yield {
                "model": name,
                "params": sum(p.numel() for p in sides["ours"].model.parameters()),
                "mode": mode,
                "batch": batch,
                "length": length,
                "precision": precision,
                "compiled": compiled,
                **{f"{side} tokens/s": round(value) for side, value in speeds.items()},
                "ratio": round(speeds["ours"] / speeds["transformers"], 2),
                **{f"{side} s to compile": round(value, 1) if compiled else None for side, value in first.items()},
            }


def bench(config: DictConfig) -> None:
    """Race all models of the config in all its modes and precisions; print, and write after every race.

    Raises:
        ValueError: for a model without a shape or a mode that is none, where transformers is not installed, or models
            that differ.
    """
    check_known("shape", config.models, config.shapes)
    check_known("mode", config.modes, MODES)
    try:
        import_transformers().logging.set_verbosity_error()
    except ImportError as error:
        raise ValueError("the models to run beside are in transformers: pip install -e '.[test]'") from error
    where = environment("cpu") | {"rounds": config.rounds}
    rows, text = [], ""
    for name, precision in itertools.product(config.models, config.precisions):
        for row in rows_of(name, precision, config):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            frame = pd.DataFrame(rows)
            text = f"{in_words(where)}\n\n{markdown(frame.dropna(axis='columns', how='all'))}"
            write(config.out, "cpu", text, where, frame)
    print(text)
