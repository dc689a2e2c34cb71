"""Print text from a finished run, whatever its objective: python -m experiments.sample run=runs/cells/<id>

Shape letters: B sequences, T tokens.
"""

import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from experiments.data.token_data import TokenData
from experiments.harness.parts import build
from experiments.harness.weights import load_run
from experiments.terminal import command, given
from objectives.contracts import MASKED, Request
from objectives.decoding.draws import Draw


def encode(text: str, data: TokenData) -> list[int]:
    """Ids of a prompt, the longest piece of the vocabulary first: for BPE one of several spellings of the same bytes.

    Raises:
        ValueError: for a byte that the vocabulary does not have.
    """
    ids = {piece: i for i, piece in enumerate(data.pieces) if piece}
    longest, rest, out = max(map(len, ids)), text.encode(), []
    while rest:
        size = next((n for n in range(min(longest, len(rest)), 0, -1) if rest[:n] in ids), 0)
        if not size:
            pieces = ", ".join(repr(piece.decode(errors="replace")) for piece in data.pieces if piece)
            missing = rest[:1].decode(errors="replace")
            raise ValueError(f"prompt={text!r}: {data.name} is written without {missing!r}; its pieces are {pieces}")
        out.append(ids[rest[:size]])
        rest = rest[size:]
    return out


def encode_with_masks(prompt: str, mask: str | None, data: TokenData) -> list[int]:
    """Ids of a prompt, with -1 for each `mask` in it."""
    ids: list[int] = []
    for i, part in enumerate(prompt.split(mask) if mask else [prompt]):
        ids += [MASKED] * (i > 0) + encode(part, data)
    return ids


@command("sample")
def main(config: DictConfig) -> None:
    given(config)
    run = load_run(Path(config.run), trusted=config.trusted)
    request = Request(
        prompts=[torch.tensor(encode_with_masks(config.prompt, config.mask, run.data), dtype=torch.long)],
        length=config.length,
        generator=torch.Generator().manual_seed(config.seed),
        draw=Draw(config.temperature, config.top_p),
        copies=config.number,
        stop=(run.data.eot,) if config.stop else (),
    )
    sampler = build(config.sampler) or None
    start = time.perf_counter()
    samples = run.objective.sample(run.model, request, sampler)
    seconds = time.perf_counter() - start
    for tokens_T, length in zip(samples.tokens_BT, samples.lengths_B.tolist(), strict=True):
        print(run.data.decode(tokens_T[:length].numpy()), end="\n\n")
    print(
        f"{samples.predictions * config.number:.0f} predictions, {samples.evaluations:.4g} passes of the network and "
        f"{run.objective.sampling_flops(run.model, request, samples):.4g} FLOPs per text, "
        f"{samples.lengths_B.sum() / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
