"""The lightning indexer in fp8: numbers as DeepSeek-V3.2-Exp rounds them, the same picks on every backend, and what the
rounding costs, as docs/kernels.md has it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from archs import number_formats
from kernels import lightning_indexer
from kernels.common.launch import check_fp8
from kernels.common.trial import TOLERANCE, error_against_reference
from kernels.indexer import FP8_OPERATION, OPERATION
from kernels.indexer.fp8 import quantised, rounded
from kernels.indexer.reference import index_scores

on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
in_fp8 = partial(lightning_indexer, precision="fp8")


def problem(T, *, batch=2, heads=3, head_dim=8, keys=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    found = OPERATION.random_problem(T, batch=batch, heads=heads, head_dim=head_dim, keys=keys, generator=generator)
    return {name: x.to(dtype) for name, x in found.items()}


def test_a_row_is_scaled_by_the_least_power_of_two_and_its_numbers_rounded_to_the_nearest():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator) * (8 * torch.randn(500, 24, generator=generator)).exp()
    numbers, scale = quantised(x)
    assert torch.equal(scale.log2(), scale.log2().round())
    largest = (x / scale[:, None]).abs().amax(-1)
    assert ((largest <= 448) & (largest > 224)).all()
    expected = number_formats.rounded(x / scale[:, None], number_formats.E4M3)
    assert torch.equal(numbers.float(), expected) and torch.equal(rounded(x), expected * scale[:, None])


def test_numbers_all_below_a_ten_thousandth_are_scaled_as_if_that_were_the_largest():
    assert quantised(torch.tensor([[1e-9, 0.0], [0.0, 0.0], [1e-4, 0.0]]))[1].unique().numel() == 1
    assert rounded(torch.tensor([[0.0, 448.0, -0.0625], [0.0, 448.5, 1.0]])).tolist() == [
        [0, 448, -0.0625],
        [0, 448, 1],
    ]


def test_numbers_that_fp8_holds_stay_as_they_are_in_any_dtype():
    x = rounded(problem(50)["q"])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(rounded(x.to(dtype)).float(), x)


@pytest.mark.parametrize("T, keys, causal", [(37, 60, True), (9, 20, False), (7, 90, True)])
def test_in_blocks_the_same_is_picked_as_of_scores_of_the_rounded_numbers(T, keys, causal):
    inputs = problem(T, keys=keys)
    by_hand = inputs | {name: rounded(inputs[name]) for name in ("q", "k")}
    expected = lightning_indexer(**by_hand, topk=7, causal=causal, backend="reference")
    for backend in ("reference", "torch"):
        assert torch.equal(in_fp8(**inputs, topk=7, causal=causal, backend=backend), expected)
    assert not torch.equal(lightning_indexer(**inputs, topk=7, causal=causal), expected)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "keys", "sizes"),
    [(9, 40, {}), (3, 300, {"heads": 64, "head_dim": 128}), (3, 140, {"heads": 17, "head_dim": 72})],
)
def test_triton_multiplies_in_fp8_and_picks_the_same_up_to_sums(T, keys, sizes, dtype, triton_device):
    inputs = problem(T, keys=keys, batch=1, dtype=dtype, **sizes)
    got = in_fp8(**{name: x.to(triton_device) for name, x in inputs.items()}, topk=20, backend="triton").cpu()
    expected = in_fp8(**inputs, topk=20, backend="reference")
    assert torch.equal(got < 0, expected < 0)
    scores = index_scores(rounded(inputs["q"]), rounded(inputs["k"]), inputs["weights"])
    of = [scores.gather(2, x.long().clamp(min=0)).masked_fill(x < 0, 0.0).sort(-1).values for x in (got, expected)]
    torch.testing.assert_close(*of, rtol=0, atol=2e-6)


@on_triton
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_key_with_nan_or_infinity_is_picked_last(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    k = torch.ones(1, 6, 8)
    k[0, 2, 3], k[0, 4, 0] = torch.nan, torch.inf
    inputs = {"q": torch.ones(1, 1, 2, 8), "k": k, "weights": torch.ones(1, 1, 2)}
    got = in_fp8(**{name: x.to(device) for name, x in inputs.items()}, topk=4, backend=backend)
    assert got[0, 0].tolist() == [0, 1, 3, 5]


@pytest.mark.thorough
def test_a_trial_finds_triton_right_in_fp8_and_would_find_a_lost_scale(triton_device, monkeypatch):
    inputs = FP8_OPERATION.random_problem(52, batch=1, heads=2, head_dim=4, generator=torch.Generator().manual_seed(0))

    def error():
        side = FP8_OPERATION.on_backend("triton")
        return error_against_reference(side, FP8_OPERATION, inputs, triton_device, torch.bfloat16, gradients=True)

    assert error() < TOLERANCE[torch.bfloat16]
    from kernels.indexer import triton_operators

    right = triton_operators.lightning_indexer
    monkeypatch.setattr(triton_operators, "lightning_indexer", lambda *a: right(*a[:-1], torch.ones_like(a[-1])))
    assert error() > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp4"}, "precision='fp4' of lightning_indexer must be 'fp8', or None"),
        ({"precision": "fp8", "backend": "cuda"}, "backend 'cuda' of lightning_indexer has no fp8: choose"),
    ],
)
def test_what_is_not_there_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        lightning_indexer(**problem(2), topk=3, **options)


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("kernels.common.launch.capability", lambda x: (8, 0))
    with pytest.raises(ValueError, match="fp8 takes a GPU of compute capability 8.9 or higher, not 8.0: choose"):
        check_fp8(torch.zeros(1))


def hadamard(size):
    """Return Sylvester's orthogonal matrix [size, size], by which the release turns queries and keys first."""
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H * size**-0.5


def drawn(numbers, T, S, H=64, D=128):
    """Return queries, keys and weights of one sequence, with heads as in DeepSeek-V3.2."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    q, k, weights = normal(1, T, H, D), normal(1, S, D), normal(1, T, H) * (H * D) ** -0.5
    if numbers.startswith("Student"):
        q, k = (x * (3 / normal(3, *x.shape).square().sum(0)).sqrt() for x in (q, k))
    if numbers.startswith("channels"):
        q, k = q * (1.5 * normal(H, D)).exp(), k * (1.5 * normal(D)).exp()
    if numbers.endswith("Hadamard matrix"):
        q, k = q @ hadamard(D), k @ hadamard(D)
    return q, k, weights


def cost(numbers, topk, S):
    """Return how much fp8 keeps, in percent: of the topk of S picks by exact scores, and of what the softmax of those
    scores, which the indexer learns, gives to them. 16 queries that see all keys."""
    q, k, weights = drawn(numbers, 16, S)
    scores = index_scores(q, k, weights)
    exact, found = (run(q, k, weights, topk, causal=False).long() for run in (lightning_indexer, in_fp8))
    both = torch.zeros_like(scores).scatter_(2, exact, 1.0).gather(2, found)
    given = scores.softmax(-1)
    mass = given.gather(2, found).sum(-1) / given.gather(2, exact).sum(-1)
    return 100 * both.mean().item(), 100 * mass.mean().item()


TABLE = (
    (Path(__file__).parents[2] / "docs/kernels.md").read_text().partition("what fp8 keeps of")[2].partition("\n\n")[0]
)
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in TABLE.splitlines()[2:]]


def test_the_documents_have_a_table_of_what_fp8_costs():
    assert len(ROWS) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@pytest.mark.parametrize(
    ("column", "topk", "S"), [(1, 512, 8192), pytest.param(2, 2048, 32768, marks=pytest.mark.thorough)]
)
def test_the_table_says_what_fp8_costs(row, column, topk, S):
    said = [float(x) for x in re.findall(r"[\d.]+", row[column])]
    assert cost(row[0], topk, S) == pytest.approx(said, abs=0.1)
