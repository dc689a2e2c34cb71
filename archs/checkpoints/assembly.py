"""A family's model, put together from its layers, and the rules that bring its tensors from a file and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from archs.checkpoints.rules import Rule, same, scaled, shifted
from archs.checkpoints.settings import Settings
from archs.language_model import LanguageModel


@dataclass(frozen=True)
class Part:
    """A mixer or a channel. name: theirs, within a layer. build: makes ours from the width. rules: of its tensors, by
    their names within the part."""

    name: str
    build: Callable[[int], Any]
    rules: Sequence[Rule]


@dataclass(frozen=True)
class Layer:
    """norms: their name of each of ours ("mixer_norm", "mixer_post_norm", "channel_norm", "channel_post_norm")."""

    mixer: Part
    channel: Part | None
    norms: Mapping[str, str]


@dataclass(frozen=True)
class Ends:
    """The parts of a family that are not in its layers, and where it has them.

    stem: in front of all but the head. shift: what is added to the weight of each norm. scale: of the embeddings.
    positions: number of learned positions. layer_norm: LayerNorm in place of RMSNorm.
    """

    stem: str = "model."
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    shift: float = 0.0
    scale: float = 1.0
    positions: int | None = None
    layer_norm: bool = False


@dataclass(frozen=True)
class Blueprint:
    """model: on the meta device. embedding: its name in a file. unused: patterns of the names of tensors in a file that
    have no part in the forward pass (buffers that can be computed, layers that predict further ahead)."""

    model: LanguageModel
    rules: Sequence[Rule]
    embedding: str
    unused: Sequence[str]

    def file_of(self, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a file, of a state of the model, in a dtype or that of the state."""
        return {
            name: x.to(torch.float32 if rule.float32 else dtype or x.dtype)
            for rule in self.rules
            for name, x in zip(rule.theirs, rule.unfold([state[ours] for ours in rule.ours]), strict=True)
        }

    def state_of(self, file: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of the model in a dtype, in memory of its own, of the tensors of a file."""
        state = {}
        for rule in self.rules:
            folded = rule.fold([file[name].to(torch.float32 if rule.float32 else dtype) for name in rule.theirs])
            state |= {
                ours: x.clone(memory_format=torch.contiguous_format) for ours, x in zip(rule.ours, folded, strict=True)
            }
        return state


def assemble(
    settings: Settings,
    layers: Sequence[Layer],
    width: int,
    *,
    eps: float,
    tied: bool,
    ends: Ends = Ends(),
    norm_at: str = "pre",
    unused: Sequence[str] = (),
) -> Blueprint:
    """The Blueprint of these layers. eps: of the norms. tied: what it means that tie_word_embeddings is absent."""
    tied, vocab = settings.take("tie_word_embeddings", tied), settings.take("vocab_size")
    kinds = ("weight", "bias") if ends.layer_norm else ("weight",)
    rules, mixers, channels, pattern = [], {}, {}, []
    for i, layer in enumerate(layers):
        ours, theirs = f"blocks.{i}.", f"{ends.stem}{ends.layers}.{i}."
        mixers[f"mixer{i}"] = layer.mixer.build
        rules += [rule.within(f"{ours}mixer.", f"{theirs}{layer.mixer.name}.") for rule in layer.mixer.rules]
        if layer.channel is not None:
            channels[f"channel{i}"] = layer.channel.build
            rules += [rule.within(f"{ours}channel.", f"{theirs}{layer.channel.name}.") for rule in layer.channel.rules]
        pattern.append(f"mixer{i}" if layer.channel is None else f"mixer{i}+channel{i}")
        rules += [
            shifted(f"{ours}{our}.{kind}", f"{theirs}{their}.{kind}", ends.shift if kind == "weight" else 0.0)
            for our, their in layer.norms.items()
            for kind in kinds
        ]
    # A tied head divides by the width, and reads embeddings that were scaled: the norm before it takes both back.
    factor = width / ends.scale if tied else 1.0
    rules += [
        shifted(f"norm.{kind}", f"{ends.stem}{ends.norm}.{kind}", ends.shift if kind == "weight" else 0.0, factor)
        for kind in kinds
    ]
    rules.append(scaled("embedding.weight", f"{ends.stem}{ends.embedding}.weight", ends.scale))
    if ends.positions is not None:
        rules.append(same("positions.weight", f"{ends.stem}wpe.weight"))
    if not tied:
        rules.append(same("head.weight", "lm_head.weight"))
    with torch.device("meta"):
        model = LanguageModel(
            vocab,
            width,
            pattern,
            mixers,
            channels,
            depth=len(layers),
            tied=tied,
            norm=partial(nn.LayerNorm if ends.layer_norm else nn.RMSNorm, eps=eps),
            norm_at=norm_at,
            max_length=ends.positions,
        )
    return Blueprint(model, rules, f"{ends.stem}{ends.embedding}.weight", unused)
