"""Training speed of our backbones beside the same models in transformers, in one run on this machine.

python -m experiments.bench out=bench.json
python -m experiments.bench kernels=recurrent      # the operations instead, see kernel_bench.py

Both sides have the same shape and the same weights: ours is converted from theirs, and nothing is timed before the two
give the same logits. A step is forward, cross-entropy, backward and AdamW. The sides take turns; medians are shown.
"""

import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import hydra
import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from archs.pretrained import from_transformers
from experiments import kernel_bench
from experiments.harness.hardware import device_name


def pair(shape: dict):
    """A model of transformers and ours of its weights.

    Raises:
        ValueError: the two do not give the same logits, to 1e-3 of their standard deviation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **special)).float()
    ours = from_transformers(theirs.eval())
    tokens_BT = torch.randint(shape["vocab_size"], (2, 100))
    with torch.no_grad():
        expected = theirs(tokens_BT, use_cache=False).logits
        off = (ours(tokens_BT) - expected).abs().max() / expected.std()
    if not off < 1e-3:
        raise ValueError(f"{shape['model_type']}: logits differ by {off:.1e} of their standard deviation")
    return theirs.train(), ours.train()


def step_seconds(logits_of, optimizer, tokens_BT: Tensor, precision: str) -> float:
    """Seconds of one training step."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        logits_BTV = logits_of(tokens_BT)
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def race(shape: dict, precision: str, batch: int, length: int, rounds: int) -> dict:
    """Median training tokens a second of both sides, and their ratio."""
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


@hydra.main(version_base="1.3", config_path="../configs", config_name="bench")
def main(config: DictConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if "kernels" in config:
        return kernel_bench.bench(config.kernels)
    shapes = OmegaConf.to_container(config.shapes)
    if unknown := [name for name in config.models if name not in shapes]:
        sys.exit(f"error: no shape {unknown[0]!r}: choose from {', '.join(shapes)}")
    try:
        import transformers
    except ImportError:
        sys.exit("error: the models to run beside are in transformers: pip install -e '.[test]'")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in config.models:
        for precision in config.precisions:
            shape = OmegaConf.to_container(config.common) | shapes[name]
            rows.append(race(shape, precision, config.batch, config.length, config.rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    where = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": date.today().isoformat(),
        "batch": config.batch,
        "length": config.length,
        "rounds": config.rounds,
    }
    print(pd.DataFrame(rows).to_string(index=False))
    print(json.dumps(where))
    if config.out is not None:
        Path(config.out).write_text(json.dumps(where | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
