"""Pieces flipped in a model of moves: its residual stream goes along a probe's direction, and the moves that it holds
for legal are then those of the edited board, or not (Li et al., arXiv 2210.13382; Nanda et al., 2309.00941).

Shape letters: G games, T plies, N flips, D model width, S squares, V token ids.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.data.othello import Othello

AT_ONCE = 256  # games
ERRORS = ("edited", "random", "unedited")  # where a piece was flipped, something else of that length done, nothing


@dataclass(frozen=True, eq=False)
class Flips:
    """Pieces that are to change their side, one of a game at most, each of which changes what is allowed: of which game
    [N], in front of which ply [N], on which square [N], whether it is theirs before [N], and what is allowed then
    [N, V]."""

    game: np.ndarray
    ply: np.ndarray
    square: np.ndarray
    theirs: np.ndarray
    allowed: np.ndarray

    def directions(self, weights_DS3: np.ndarray, said_GTS3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shortest changes [N, D] of a residual stream by which its probe, now undecided between the two
        sides, is for the new one by 1, and how much it is for it as it is, [N]."""
        sides_SD = (weights_DS3[..., 1] - weights_DS3[..., 2]).T
        to_mine = np.where(self.theirs, 1.0, -1.0)
        direction_ND = sides_SD[self.square] * to_mine[:, None]
        said_N3 = said_GTS3[self.game, self.ply, self.square]
        return direction_ND / (direction_ND**2).sum(1, keepdims=True), (said_N3[:, 1] - said_N3[:, 2]) * to_mine


def draw_flips(rules: Othello, mine_GT: np.ndarray, theirs_GT: np.ndarray) -> Flips:
    """Draw for each game a ply and a piece then on the board whose flip changes what is allowed but leaves a square to
    be played, as there was; a game without any is left out."""
    random = np.random.default_rng(0)
    filled_GTS = rules.bits(mine_GT | theirs_GT)
    square_GT = np.where(filled_GTS, random.random(filled_GTS.shape), -1.0).argmax(-1)
    piece_GT = np.uint64(1) << square_GT.astype(np.uint64)
    before, after = (mine_GT, theirs_GT), (mine_GT ^ piece_GT, theirs_GT ^ piece_GT)
    changed_GT = rules.playable(*before) != rules.playable(*after)
    for boards in (before, after):
        changed_GT &= rules.playable(*boards) != 0
    game = np.flatnonzero(changed_GT.any(1))
    ply = np.where(changed_GT, random.random(changed_GT.shape), -1.0).argmax(1)[game]
    allowed = rules.allowed(*(board[game, ply] for board in after))
    return Flips(game, ply, square_GT[game, ply], (theirs_GT & piece_GT)[game, ply] != 0, allowed)


def edits(
    model: LanguageModel,
    inputs_GT: Tensor,
    flips: Flips,
    layer: int,
    directions: tuple[np.ndarray, np.ndarray],
    strengths: list[float],
    random: np.random.Generator,
) -> dict[str, float]:
    """Return what comes of flips behind a block, at the strength with the fewest errors in games that are not judged.

    An edit goes along its direction until the probe is for the new side by the strength. Errors are the tokens that are
    wrongly among the likeliest, of which as many are taken as are allowed on the edited board, and those that are
    wrongly not (Li et al., section 4.2). Columns: "strength", "edited_fitted"; in games that are judged the mean errors
    "edited", "random" (an edit of the same length in a random direction) and "unedited", and "exact", "exact_random"
    and "exact_unedited", in which part of the positions there are none.
    """
    way_ND, said_N = directions
    judged_N = flips.game % 2 == 1

    def errors(edit_ND: np.ndarray) -> np.ndarray:
        return wrong(edited_logits(model, inputs_GT[flips.game], flips.ply, edit_ND, layer), flips.allowed)

    tried = {strength: (edit := way_ND * (strength - said_N)[:, None], errors(edit)) for strength in strengths}
    strength = min(tried, key=lambda at: tried[at][1][~judged_N].mean())
    edit_ND, edited_N = tried[strength]
    noise_ND = random.normal(size=edit_ND.shape)
    noise_ND *= np.linalg.norm(edit_ND, axis=1, keepdims=True) / np.linalg.norm(noise_ND, axis=1, keepdims=True)
    found = {"": edited_N, "_random": errors(noise_ND), "_unedited": errors(np.zeros_like(edit_ND))}
    line = {"strength": strength, "edited_fitted": float(edited_N[~judged_N].mean())}
    for column, errors_N in zip(ERRORS, found.values(), strict=True):
        line[column] = float(errors_N[judged_N].mean())
    return line | {f"exact{name}": float((errors_N[judged_N] == 0).mean()) for name, errors_N in found.items()}


@torch.no_grad()
def edited_logits(
    model: LanguageModel, inputs_NT: Tensor, ply_N: np.ndarray, edit_ND: np.ndarray, layer: int
) -> np.ndarray:
    """Return the logits [N, V] at one ply of each game, to whose residual stream an edit is added behind a block."""
    device, logits = next(model.parameters()).device, []
    parts = (x.split(AT_ONCE) for x in (inputs_NT, torch.from_numpy(ply_N), torch.from_numpy(edit_ND).float()))
    for tokens, ply, edit in zip(*parts, strict=True):
        at = torch.arange(len(tokens)), ply

        def add(block: object, given: object, out: tuple, at: tuple = at, edit: Tensor = edit) -> tuple:
            x_NTD = out[0].clone()
            x_NTD[at] += edit.to(x_NTD)
            return x_NTD, out[1]

        with model.blocks[layer - 1].register_forward_hook(add):
            logits.append(model(tokens.to(device))[at].float().cpu())
    return torch.cat(logits).numpy()


def wrong(logits_NV: np.ndarray, allowed_NV: np.ndarray) -> np.ndarray:
    """Return the errors [N] when as many of the likeliest tokens are taken as are allowed: those taken wrongly, and as
    many wrongly not."""
    number_N = allowed_NV.sum(1)
    taken_NV = (-logits_NV).argsort(1).argsort(1) < number_N[:, None]
    return 2 * (number_N - (taken_NV & allowed_NV).sum(1))
