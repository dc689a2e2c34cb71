"""Board state: what is read and flipped in a model of moves, and the verdict that follows."""

import numpy as np
import pandas as pd
import pytest
import torch

from archs.visibility import CAUSAL
from experiments.data.othello import Othello
from experiments.harness.parts import build_model, build_objective
from experiments.studies.board_edits import draw_flips, edited_logits, wrong
from experiments.studies.board_state import BoardState, read_boards, squares, streams, summary, text

STUDY = BoardState("c", "s", "r", architectures={"a": [], "b": []}, seeds=[], strengths=[])
RULES = Othello(4)
TOKENS_GT, _ = RULES.draw(400, 12, np.random.default_rng(0))
MINE_GT, THEIRS_GT = RULES.boards(TOKENS_GT)


def table(trained, edited, untrained=0.7, moves=0.9, random=1.6):
    """Per seed the squares told and the errors where a piece was flipped, by the layer that is chosen; the other fits
    worse, and its numbers are better."""
    rows = []
    for seed, (told, errors) in enumerate(zip(trained, edited, strict=True)):
        for arch, off in (("a", 0.001), ("b", -0.001)):
            run = {"architecture": arch, "seed": seed, "status": "done"}
            others = {"random": random, "unedited": 1.5, "exact": 0.5, "exact_random": 0.2, "exact_unedited": 0.3}
            for layer, fitted, accuracy, left in ((1, 0.5, 0.99, 0.1), (2, 0.9, told + off, errors)):
                line = {"accuracy_fitted": fitted, "accuracy": accuracy, "edited_fitted": 2 - fitted, "edited": left}
                rows.append(run | {"model": "trained", "layer": layer, "legal": 0.98} | line | others)
            rows.append(run | {"model": "trained", "layer": 3, "accuracy_fitted": 0.1, "accuracy": 0.2, "legal": 0.98})
            rows.append(run | {"model": "untrained", "layer": 1, "accuracy_fitted": 0.7, "accuracy": untrained})
            rows.append(run | {"model": "moves", "layer": 0, "accuracy_fitted": 0.9, "accuracy": moves})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("trained", "edited", "settings", "outcome", "part"),
    [
        ([0.95, 0.96, 0.95], [0.9, 1.0, 0.9], {}, "holds", "edit"),
        ([0.85, 0.86, 0.85], [0.9, 1.0, 0.9], {}, "does not hold", "probe"),  # the moves themselves tell more
        ([0.95, 0.96, 0.95], [0.9, 1.0, 0.9], {"untrained": 0.97}, "does not hold", "probe"),
        ([0.95, 0.96, 0.95], [1.7, 1.8, 1.7], {"random": 1.9}, "does not hold", "edit"),  # worse than no edit
        ([0.95, 0.96, 0.95], [0.9, 1.0, 0.9], {"random": 0.5}, "does not hold", "edit"),  # worse than a random one
        ([0.95, 0.96, 0.95], [1.0, 1.9, 1.2], {}, "cannot tell", "edit"),
        ([0.95, 0.86, 0.93], [0.9, 1.0, 0.9], {}, "cannot tell", "probe"),
        ([0.95], [0.9], {}, "cannot tell", "probe"),
    ],
)
def test_the_board_is_read_better_than_from_either_baseline_and_edits_help(trained, edited, settings, outcome, part):
    verdict = STUDY.verdict(table(trained, edited, **settings))
    assert verdict.outcome == outcome and verdict.rule == "r" and f"the {part} of" in verdict.sentence.lower()


def test_a_layer_is_chosen_by_the_games_fitted_on():
    found = summary(table([0.95, 0.96], [0.9, 1.2])).set_index(["architecture", "seed"])
    assert found.trained["a", 1] == pytest.approx(0.961) and found.edited["a", 1] == 1.2
    assert found.probe["a", 0] == pytest.approx(1 - 0.049 / 0.1) and found.edit["a", 0] == pytest.approx(1 - 0.9 / 1.5)


def test_the_probe_tells_what_is_planted_and_the_moves_tell_empty_squares():
    boards = squares(RULES, MINE_GT.ravel(), THEIRS_GT.ravel())
    assert (boards.sum(-1) == 1).all()
    other, random = np.arange(len(boards)) % 2 == 1, np.random.default_rng(0)
    planted = (boards[..., 1] * 1.0 - boards[..., 2]) @ random.normal(size=(16, 16))
    planted = np.concatenate([planted, boards[..., 0] @ random.normal(size=(16, 16))], axis=1)
    found = read_boards(planted - planted[~other].mean(0), boards, other)[2]
    assert found["accuracy"] > 0.999 and found["accuracy_filled"] > 0.999
    noise = read_boards(random.normal(size=(len(boards), 32)), boards, other)[2]
    assert noise["accuracy"] < 0.75
    inputs_GT = np.pad(TOKENS_GT[:, :-1], ((0, 0), (1, 0)))
    looked_GT = np.ones_like(inputs_GT, bool)
    x_NF = text(inputs_GT, looked_GT, RULES.vocab_size)
    assert (x_NF.sum(1) == 12).all()
    _, said, found = read_boards(x_NF, boards, np.repeat(np.arange(400) % 2 == 1, 12))
    assert ((said.argmax(-1) == 0) == boards[..., 0]).mean() > 0.99 and noise["accuracy"] < found["accuracy"] < 0.99


def test_a_flip_changes_what_is_allowed_by_turning_one_piece():
    flips = draw_flips(RULES, MINE_GT, THEIRS_GT)
    mine, theirs = (board[flips.game, flips.ply] for board in (MINE_GT, THEIRS_GT))
    piece = np.uint64(1) << flips.square.astype(np.uint64)
    assert len(set(flips.game)) == len(flips.game) > 350 and ((mine | theirs) & piece != 0).all()
    assert np.array_equal(theirs & piece != 0, flips.theirs) and 0.2 < flips.theirs.mean() < 0.8
    assert np.array_equal(RULES.allowed(mine ^ piece, theirs ^ piece), flips.allowed)
    assert (RULES.allowed(mine, theirs) != flips.allowed).any(1).all() and flips.allowed[:, 1:-1].any(1).all()


def test_along_its_direction_the_probe_comes_to_tell_the_other_side_as_surely_as_is_asked():
    flips, random = draw_flips(RULES, MINE_GT, THEIRS_GT), np.random.default_rng(0)
    weights_DS3, x_GTD = random.normal(size=(8, 16, 3)), random.normal(size=(400, 12, 8))
    way_ND, said_N = flips.directions(weights_DS3, np.einsum("gtd,dsk->gtsk", x_GTD, weights_DS3))
    x_ND = x_GTD[flips.game, flips.ply] + way_ND * (3.0 - said_N)[:, None]
    said_N3 = np.einsum("nd,dnk->nk", x_ND, weights_DS3[:, flips.square])
    assert np.where(flips.theirs, 1, -1) * (said_N3[:, 1] - said_N3[:, 2]) == pytest.approx(3.0)


def test_errors_are_tokens_wrongly_among_the_likeliest_and_as_many_that_are_wrongly_not():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]] * 3)
    allowed = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]], bool)
    assert wrong(logits, allowed).tolist() == [0, 2, 4]


def test_an_edit_is_added_at_its_ply_alone_behind_its_block_and_is_gone_afterwards(make_run, data):
    config = make_run("arch=gated_delta_hybrid").config
    model = build_model(config, build_objective(config, data)).eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.from_numpy(data.heldout[:96].astype(np.int64)).view(3, 32)
    ply, at = np.array([4, 0, 31]), (torch.arange(3), torch.tensor([4, 0, 31]))
    edit = np.random.default_rng(0).normal(size=(3, model.width))
    with torch.no_grad():
        plain = model(tokens)[at].numpy()
        x = torch.from_numpy(streams(model, tokens)[1])
        x[at] += torch.from_numpy(edit).float()
        for block in model.blocks[1:]:
            x, _ = block(x, CAUSAL)
        expected = model.logits(model.norm(x))[at].numpy()
    assert model.depth > 1 and np.abs(expected - plain).max() > 0.1
    assert edited_logits(model, tokens, ply, edit, 1) == pytest.approx(expected, abs=1e-4)
    assert edited_logits(model, tokens, ply, 0 * edit, 1) == pytest.approx(plain, abs=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
