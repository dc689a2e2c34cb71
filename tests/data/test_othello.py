"""Othello: the rules against published counts and against rules written out square by square, and games as data."""

import math

import numpy as np
import pytest
from hydra.utils import instantiate

from experiments.data.othello import EOT, STEPS, Othello, othello

SMALL = dict(size=4, sequence_length=13, train_games=50, heldout_games=20, seed=0)


def continued(rules, mine, theirs):
    """The boards after every move that is allowed, and the number of games that are over before one."""
    allowed = rules.allowed(mine, theirs)
    games, tokens = np.nonzero(allowed[:, 1:])
    return *rules.play(mine[games], theirs[games], tokens + 1), int(allowed[:, EOT].sum())


def test_the_first_plies_have_the_published_numbers_of_games():
    rules, counts = Othello(8), []  # OEIS A124004
    mine, theirs = rules.start(1)
    for _ in range(6):
        mine, theirs, over = continued(rules, mine, theirs)
        counts.append(len(mine))
        assert not over
    assert counts == [4, 12, 56, 244, 1396, 8200]


def test_the_small_board_has_the_published_number_of_games_to_their_ends():
    rules, ended = Othello(4), 0
    mine, theirs = rules.start(1)
    while len(mine):
        mine, theirs, over = continued(rules, mine, theirs)
        ended += over
    assert ended == 4 * 15_015  # reversi-nxn.blogspot.com, which counts one of the four first moves


def flipped(board, size, row, column, me):
    """The places that turn when `me` plays here, on a dict from places to players."""
    found = []
    for down, right in STEPS:
        line, place = [], (row + down, column + right)
        while board.get(place) == 1 - me:
            line.append(place)
            place = place[0] + down, place[1] + right
        found += line if board.get(place) == me else []
    return found


@pytest.mark.parametrize("size", [4, 6, 8])
def test_games_are_those_of_the_rules_written_out_square_by_square(size):
    rules, plies = Othello(size), size**2
    tokens_NT, nats = rules.draw(15, plies, np.random.default_rng(0))
    mine_NT, theirs_NT = rules.boards(tokens_NT)
    allowed_NTV, log_options, middle = rules.allowed(mine_NT, theirs_NT), 0.0, size // 2
    for n, tokens in enumerate(tokens_NT):
        board = {(middle - 1, middle): 0, (middle, middle - 1): 0, (middle, middle): 1, (middle - 1, middle - 1): 1}
        for t, token in enumerate(tokens):
            places = [divmod(s, size) for s in range(size**2)]
            turns = [[flipped(board, size, *place, me) if place not in board else [] for place in places]
                     for me in (t % 2, 1 - t % 2)]  # fmt: skip
            options = [1 + s for s, line in enumerate(turns[0]) if line]
            options = options or [rules.vocab_size - 1 if any(turns[1]) else EOT]
            assert np.flatnonzero(allowed_NTV[n, t]).tolist() == options and token in options
            for bits, me in ((mine_NT, t % 2), (theirs_NT, 1 - t % 2)):
                assert rules.bits(bits[n, t]).tolist() == [board.get(place) == me for place in places]
            log_options += math.log(len(options))
            if EOT < token <= size**2:
                place = places[token - 1]
                board |= dict.fromkeys([place, *flipped(board, size, *place, t % 2)], t % 2)
    assert nats == pytest.approx(log_options)


def test_who_cannot_play_passes_and_behind_the_end_of_a_game_are_ends():
    rules = Othello(4)
    tokens_NT, _ = rules.draw(500, 20, np.random.default_rng(0))
    passed, over = tokens_NT == rules.vocab_size - 1, tokens_NT == EOT
    assert passed.any() and not (passed[:, 1:] & passed[:, :-1]).any()
    assert over[:, -1].all() and (over[:, 1:] >= over[:, :-1]).all() and not over[:, 0].any()


def test_the_data_is_a_function_of_its_settings_and_its_entropy_is_that_of_the_draws():
    a, b, other = (othello(**SMALL | {"seed": seed}) for seed in (0, 0, 1))
    assert np.array_equal(a.train, b.train) and a.digest == b.digest != other.digest
    longer = othello(**SMALL | {"train_games": 51})
    assert np.array_equal(a.heldout, longer.heldout) and a.digest != longer.digest
    assert not np.array_equal(a.heldout[: 13 * 20], a.train[: 13 * 20])
    rules = Othello(4)
    options = rules.allowed(*rules.boards(a.heldout.reshape(20, 13).astype(int))).sum(-1)
    assert a.heldout_entropy == pytest.approx(np.log(options).sum())
    assert (len(a.train), a.heldout_bytes, a.vocab_size, len(a.pieces)) == (650, 260, 18, 18)
    assert a.decode([1, 4, 13, 17]) == "a1 d1 a4 pass "


def test_the_config_makes_whole_games(make_config):
    config = make_config("data=othello", "data.tokens.train_games=20", "data.tokens.heldout_games=5")
    data = instantiate(config.data.tokens)
    assert len(data.train) == 20 * (36 - 4) and data.name == "othello/6x6"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 5}, "size=5 must be 4, 6 or 8"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"train_games": 0}, "train_games=0 must be at least 1"),
        ({"heldout_games": 0}, "heldout_games=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_games_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        othello(**SMALL | changes)
