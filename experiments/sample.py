"""Print text from a finished run, whatever its objective: python -m experiments.sample run=runs/cells/<id>"""

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.harness.run import build_model, build_objective, open_data
from objectives.sampling import GAP, Draw


def load(folder: Path, data: TokenData | None = None) -> tuple[LanguageModel, object, TokenData]:
    """The model, objective and data of a finished run; the data is opened where it is not given.

    Raises:
        ValueError: when the folder holds no finished run.
    """
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"run={folder} holds no finished run: give the folder of one, such as runs/cells/<id>")
    config = OmegaConf.load(folder / "config.yaml")
    data = open_data(config) if data is None else data
    objective = build_objective(config, data)
    model = build_model(config, objective)
    # A tied head is stored once, as the embedding.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=not model.tied)
    return model.eval(), objective, data


def encode(text: str, data: TokenData) -> list[int]:
    """Ids of a prompt, the longest piece of the vocabulary first: for BPE one of several spellings of the same bytes."""
    ids = {piece: i for i, piece in enumerate(data.pieces) if piece}
    longest, rest, out = max(map(len, ids)), text.encode(), []
    while rest:
        size = next(n for n in range(min(longest, len(rest)), 0, -1) if rest[:n] in ids)
        out.append(ids[rest[:size]])
        rest = rest[size:]
    return out


def encode_with_gaps(prompt: str, gap: str | None, data: TokenData) -> list[int]:
    """Ids of a prompt, with -1 for each `gap` in it."""
    ids: list[int] = []
    for i, part in enumerate(prompt.split(gap) if gap else [prompt]):
        ids += [GAP] * (i > 0) + encode(part, data)
    return ids


@hydra.main(version_base="1.3", config_path="../configs", config_name="sample")
def main(config: DictConfig) -> None:
    try:
        model, objective, data = load(Path(config.run))
        ids = encode_with_gaps(config.prompt, config.gap, data)
        prompt_BT = torch.tensor([ids] * config.number, dtype=torch.long).view(config.number, -1)
        draw, sampler = Draw(config.temperature, config.top_p), instantiate(config.sampler) or None
        generator = torch.Generator().manual_seed(config.seed)
        start = time.perf_counter()
        samples = objective.sample(model, prompt_BT, config.length, generator, draw, sampler)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:
        sys.exit(f"error: {error.__cause__ or error}")
    seconds = time.perf_counter() - start
    for tokens_T in samples.tokens_BT:
        print(data.decode(tokens_T.numpy()), end="\n\n")
    new = config.number * (config.length - prompt_BT.shape[1]) + int((prompt_BT == GAP).sum())
    print(
        f"{new} new tokens, {samples.evaluations:.4g} passes of the network and "
        f"{objective.sampling_flops(model, samples):.4g} FLOPs a text, {new / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
