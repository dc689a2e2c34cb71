"""Every environment keeps its contract: right answers have the reward at every difficulty, and no text breaks a
checker."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from experiments.data.environments.arithmetic import Addition, Multiplication
from experiments.data.environments.chance import Chance
from experiments.data.environments.countdown import Countdown, value
from experiments.data.environments.facts import Facts
from experiments.data.environments.gaps import Gaps
from experiments.data.environments.maze import Maze
from experiments.data.environments.mixture import Mixture
from experiments.data.environments.modular_arithmetic import ModularArithmetic
from experiments.data.environments.sorting import Sorting
from experiments.data.environments.state_tracking import Permutations
from experiments.data.environments.sudoku import Sudoku, grids
from experiments.data.environments.uncounted_sorting import UncountedSorting

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
CONFIGURED = {
    path.stem: node.tokens.environment
    for path in sorted(CONFIGS.glob("*.yaml"))
    if OmegaConf.select(node := OmegaConf.load(path), "tokens.environment") is not None
}
small = st.integers(1, 4)
EASY_TO_HARD = {
    "countdown": st.builds(Countdown, st.integers(2, 6)),
    "addition": st.builds(Addition, small, st.integers(2, 4), st.sampled_from([0, 30])),
    "multiplication": st.builds(Multiplication, small, st.sampled_from([0, 40])),
    "sorting": st.builds(Sorting, st.integers(2, 7), small),
    "uncounted_sorting": st.builds(UncountedSorting, st.integers(2, 7), small),
    "permutations": st.builds(Permutations, st.integers(2, 6), st.integers(1, 9), st.booleans()),
    "modular_arithmetic": st.builds(ModularArithmetic, st.sampled_from([2, 3, 5, 7]), st.integers(1, 9)),
    "facts": st.builds(Facts, st.integers(2, 26), small, st.integers(0, 9)),
    "gaps": st.builds(Gaps, st.integers(4, 26), small, small, small, st.integers(0, 9)),
    "maze": st.builds(Maze, st.integers(3, 5), st.floats(0, 0.5), st.integers(1, 4)),
    "sudoku": st.builds(Sudoku, st.integers(1, 16)),
}
EASY_TO_HARD["mixture"] = st.tuples(EASY_TO_HARD["countdown"], EASY_TO_HARD["maze"]).map(Mixture)
drawn = {"data": st.data(), "seed": st.integers(0, 10**6)}


@pytest.mark.parametrize("kind", EASY_TO_HARD)
@given(**drawn)
@settings(deadline=None, max_examples=40)
def test_the_answer_to_a_problem_is_right_and_an_attempt_has_its_form(kind, data, seed):
    environment, random = data.draw(EASY_TO_HARD[kind]), np.random.default_rng(seed)
    problem = environment.problem(random)
    attempt = environment.attempt(problem.prompt, random)
    assert environment.check(problem.prompt, problem.answer) == environment.gold(problem.prompt, problem.answer) == 1
    assert 0 <= environment.check(problem.prompt, attempt) <= 1
    for part, longest in zip((problem.prompt, problem.answer), environment.longest, strict=True):
        assert 0 < len(part) <= longest and set(part) <= set(environment.alphabet)
    assert 0 < len(attempt) <= environment.longest[1] and set(attempt) <= set(environment.alphabet)
    assert len(set(environment.alphabet)) == len(environment.alphabet) and 0 not in environment.alphabet


@pytest.mark.parametrize("kind", EASY_TO_HARD)
@given(**drawn)
@settings(deadline=None, max_examples=40)
def test_a_checker_takes_whatever_a_model_may_write(kind, data, seed):
    environment = data.draw(EASY_TO_HARD[kind])
    prompt, answer = (problem := environment.problem(np.random.default_rng(seed))).prompt, problem.answer
    letters = st.sampled_from(sorted({0, 255, *environment.alphabet}))
    written = data.draw(st.lists(letters, max_size=environment.longest[1] + 2).map(bytes))
    for scored in (environment.check, environment.gold):
        assert 0 <= scored(prompt, written) <= 1
        assert scored(prompt, b"") == scored(prompt, answer + b"\0") == 0


@pytest.mark.parametrize("kind", EASY_TO_HARD)
def test_problems_are_a_function_of_the_generator_and_some_attempts_are_wrong(kind):
    environment = instantiate(CONFIGURED.get(kind, CONFIGURED["tasks"]))
    first, second = (
        [environment.problem(random := np.random.default_rng(seed)) for seed in range(60)] for _ in range(2)
    )
    assert first == second and len({problem.prompt for problem in first}) > 30
    random = np.random.default_rng(0)
    rewards = [environment.gold(problem.prompt, environment.attempt(problem.prompt, random)) for problem in first]
    assert np.mean(rewards) < 0.6


@pytest.mark.parametrize("name", CONFIGURED)
def test_the_environment_of_every_config_is_held_to_the_contract_above(name):
    kinds = {"tasks": "mixture", "ranked_pairs": "countdown"}
    assert kinds.get(name, name) in EASY_TO_HARD
    instantiate(CONFIGURED[name])


@pytest.mark.parametrize(
    ("environment", "prompt", "right", "wrong"),
    [
        (Countdown(3), "3 5 7=56:", ["3+5*7", "5+3*7"], ["7*3+5", "3+5*8", "56", "8*7", "3+5*7*1"]),
        (Countdown(2), "5 5=25:", ["5*5"], ["5+5", "5*5*1", "5*", "55"]),
        (Addition(2), "47+85:", ["=132"], ["132", "=0132", "=131", "1=132", "=132 ", "="]),
        (Addition(2, scratch=9), "47+85:", ["=132", "12,13=132", "123456789=132"], ["1234567890=132", "=131"]),
        (Addition(1, operands=3), "7+8+9:", ["=24"], ["=15"]),
        (Multiplication(2, scratch=9), "12*34:", ["=408", "48,36=408"], ["=46", "408"]),
        (Sorting(3, 2), "31 7 25:", ["7 25 31"], ["25 31 7", "7 25", "7 7 25 31", "07 25 31"]),
        (UncountedSorting(3, 2), "31 7 25:", ["7 25 31", "7", "7 7 7", "7 31"], ["31 7", "8", "7  25 31"]),
        (Permutations(3, 3), "bac cab abc:", ["cba"], ["abc", "cb"]),
        (Permutations(2, 4), "ba ab ba ba:", ["ba"], ["ab"]),
        (Permutations(3, 3, states=True), "bac cab abc:", ["bac cba cba"], ["cba", "bac cba cb", "bac cab cba"]),
        (ModularArithmetic(7, 3), "3+5*2-6:", ["123"], ["124", "3", "12"]),
        (ModularArithmetic(2, 2), "1-1-1:", ["01"], ["00", "11"]),
        (Facts(16, 3), "qhxk:", ["knn"], ["nnk", "kn", "knnk"]),
        (Maze(3, moves=1), "S.#/#../#.G:", ["RDDR", "RDRD", "RLRDDR"], ["DRDR", "RDD", "RDDRR", "RLRLRDDRLR", "rddr"]),
        (Maze(2, moves=1), "GS/..:", ["L", "DLU"], ["DL", "DLUDU", "LL"]),
        (Sudoku(3), "12343.12214.4.21:", ["433"], ["343", "43", "4331"]),
        (Sudoku(16), "................:", ["1234341221434321"], ["1234341221434312", "1" * 16]),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_what_is_right_and_what_is_wrong(environment, prompt, right, wrong):
    assert [environment.check(prompt.encode(), answer.encode()) for answer in right] == [1] * len(right)
    assert [environment.check(prompt.encode(), answer.encode()) for answer in wrong] == [0] * len(wrong)


def test_the_bug_pays_what_the_true_check_does_not():
    environment, random = UncountedSorting(5), np.random.default_rng(0)
    assert environment.check(b"3 1 2 5 4:", b"1") == 1 and environment.gold(b"3 1 2 5 4:", b"1") == 0
    problems = [environment.problem(random) for _ in range(400)]
    attempts = [(p.prompt, environment.attempt(p.prompt, random)) for p in problems]
    proxy, gold = (np.mean([scored(*pair) for pair in attempts]) for scored in (environment.check, environment.gold))
    assert 0 < gold < proxy < 0.2, "the bug is there to be found, and seldom hit by chance"


def test_rewards_by_chance_say_nothing_of_what_is_right():
    environment, random = Chance(Countdown(3), 0.2), np.random.default_rng(0)
    problems = [environment.problem(random) for _ in range(2000)]
    attempts = [(p.prompt, environment.attempt(p.prompt, random)) for p in problems]
    right = [(p.prompt, p.answer) for p in problems]
    assert all(environment.gold(*pair) == 1 for pair in right)
    assert np.mean([environment.gold(*pair) for pair in attempts]) < 0.2
    for pairs in (right, attempts):  # 4.5 standard errors
        assert np.mean([environment.check(*pair) for pair in pairs]) == pytest.approx(0.2, abs=0.04)
    assert [environment.check(*pair) for pair in right] == [Chance(Countdown(3), 0.2).check(*pair) for pair in right]


def test_an_expression_is_read_from_left_to_right():
    assert [value(e) for e in (b"3+5*7", b"3-5*2", b"9", b"9*9*9-1+2")] == [56, -4, 9, 730]


def test_a_working_leads_to_its_result_and_half_of_the_answers_show_one():
    assert Addition(2).working([47, 85]) == b"12,13" and Multiplication(2).working([12, 34]) == b"48,36"
    environment, random = Addition(2, scratch=9), np.random.default_rng(0)
    shown = [not environment.problem(random).answer.startswith(b"=") for _ in range(1000)]
    assert 0.45 < np.mean(shown) < 0.55


def test_there_are_288_grids_of_four_rows():
    assert len(grids()) == len(set(grids())) == 288


def test_a_mixture_tells_its_tasks_apart_by_the_first_byte():
    mixture, random = Mixture([Countdown(3), UncountedSorting(4), Addition(2)]), np.random.default_rng(0)
    tags = {}
    for _ in range(200):
        problem = mixture.problem(random)
        tags.setdefault(problem.prompt[:1], set()).add(mixture.task(problem.prompt))
    assert tags == {b"A": {"countdown-3"}, b"B": {"uncounted_sorting-4x1"}, b"C": {"addition-2x2"}}
    assert mixture.check(b"B3 1 2 5:", b"1") == 1 and mixture.gold(b"B3 1 2 5:", b"1") == 0
    assert mixture.check(b"A3 5 7=56:", b"3+5*7") == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Countdown(1), "numbers=1 must be at least 2"),
        (lambda: Addition(0), "digits=0 and operands=2 must be at least 1 and 2"),
        (lambda: Addition(2, scratch=3), "scratch=3 must be 0, for none, or at least 5"),
        (lambda: Sorting(1), "length=1 and digits=1 must be at least 2 and 1"),
        (lambda: Permutations(1), "items=1 must be from 2 to 26"),
        (lambda: Permutations(2, 0), "length=0 at least 1"),
        (lambda: Facts(27), "letters=27 must be from 2 to 26, and length=3 at least 1"),
        (lambda: Maze(3, 1.0), "walls=1.0 from 0 to below 1"),
        (lambda: Maze(3, moves=5), "moves=5 from 1 to the 4 from corner to corner"),
        (lambda: Sudoku(0), "empty=0 must be from 1 to 16"),
        (lambda: Chance(Sudoku(3), 1.0), "rate=1.0 must be above 0 and below 1"),
        (lambda: Mixture([]), r"environments=\[\] must be from 1 to 26"),
        (lambda: Mixture([Sudoku(3), Sudoku(3)]), "each of another name"),
    ],
)
def test_difficulties_that_there_are_not_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
