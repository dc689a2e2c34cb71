"""Training speed of our backbones beside the same models in transformers, on this machine's CPU.

Both sides have the same shape and the same weights: ours is converted from theirs, and nothing is timed before the
two give the same logits. A step is forward, cross-entropy, backward and AdamW.

Shape letters: B sequences, T tokens, V token ids.
"""

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext

import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from archs import checkpoints
from experiments.bench.report import environment, in_words, markdown, write
from experiments.harness.identity import plain
from kernels.hugging_face import import_transformers


def pair(shape: dict):
    """Return a model of transformers and ours of its weights.

    Raises:
        ValueError: the two do not give the same logits, to 1e-3 of their standard deviation.
    """
    transformers = import_transformers()
    torch.manual_seed(0)
    special = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(**shape, **special)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    with tempfile.TemporaryDirectory() as folder:
        theirs.eval().save_pretrained(folder)
        ours = checkpoints.read(folder)
    tokens_BT = torch.randint(shape["vocab_size"], (2, 100))
    with torch.no_grad():
        expected = theirs(tokens_BT, use_cache=False).logits
        off = (ours(tokens_BT) - expected).abs().max() / expected.std()
    if not off < 1e-3:
        raise ValueError(f"{shape['model_type']}: logits differ by {off:.1e} of their standard deviation")
    return theirs.train(), ours.train()


def step_seconds(logits_of, optimizer, tokens_BT: Tensor, precision: str) -> float:
    """Return the seconds of one training step."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        logits_BTV = logits_of(tokens_BT)
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def race(shape: dict, precision: str, batch: int, length: int, rounds: int) -> dict:
    """Return the median training tokens per second of both sides, and their ratio."""
    theirs, ours = pair(shape)
    sides = {"transformers": (lambda x: theirs(x, use_cache=False).logits, theirs), "ours": (ours, ours)}
    sides = {name: (f, torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True)) for name, (f, m) in sides.items()}
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        tokens_BT = torch.randint(shape["vocab_size"], (batch, length))
        for name, (logits_of, optimizer) in sides.items():
            taken = step_seconds(logits_of, optimizer, tokens_BT, precision)
            if i:
                seconds[name].append(taken)
    speed = {name: batch * length / statistics.median(times) for name, times in seconds.items()}
    return {
        "model": shape["model_type"],
        "params": sum(p.numel() for p in ours.parameters()),
        "precision": precision,
        **{f"{name} tokens/s": round(value) for name, value in speed.items()},
        "ratio": round(speed["ours"] / speed["transformers"], 2),
    }


def bench(config: DictConfig) -> None:
    """Race all models of the config in all its precisions; print, and write after every race.

    Raises:
        ValueError: for a model without a shape, where transformers is not installed, or models that differ.
    """
    shapes = plain(config.shapes)
    if unknown := [name for name in config.models if name not in shapes]:
        raise ValueError(f"no shape {unknown[0]!r}: choose from {', '.join(shapes)}")
    try:
        import_transformers().logging.set_verbosity_error()
    except ImportError as error:
        raise ValueError("the models to run beside are in transformers: pip install -e '.[test]'") from error
    where = environment("cpu") | {name: config[name] for name in ("batch", "length", "rounds")}
    rows, text = [], ""
    for name in config.models:
        for precision in config.precisions:
            shape = plain(config.common) | shapes[name]
            rows.append(race(shape, precision, config.batch, config.length, config.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
            frame = pd.DataFrame(rows)
            text = f"{in_words(where)}\n\n{markdown(frame)}"
            write(config.out, "cpu", text, where, frame)
    print(text)
