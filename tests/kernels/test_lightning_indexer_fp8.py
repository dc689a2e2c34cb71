"""The lightning indexer in fp8: numbers as DeepSeek-V3.2-Exp rounds them, the same picks on every backend, and what the
rounding costs, as docs/kernels.md has it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from archs import number_formats
from kernels import lightning_indexer, lightning_indexer_keys
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130, 24), (3, 7, 1, 128), (5, 256), (2, 0, 16)])
def test_triton_rounds_keys_to_the_same_bits(shape, dtype, triton_device):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(shape, generator=generator) * (6 * torch.randn(shape, generator=generator)).exp()
    k[..., :1] *= 0.0
    k = k.clamp(-6e4, 6e4).to(triton_device, dtype)
    expected = lightning_indexer_keys(k, backend="torch")
    found = lightning_indexer_keys(k, backend="triton")
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(found[1], expected[1])


@on_triton
def test_every_number_between_two_of_fp8_goes_to_the_nearest_and_from_the_middle_to_the_even_one(triton_device):
    """All 127 numbers from 0 to 448, what lies in the middle, and the neighbours of that on either side."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])])
    x = torch.cat([x, -x])[:, None].repeat(1, 2).to(triton_device)
    x[:, 1] = 448.0
    found, scale = lightning_indexer_keys(x, backend="triton")
    assert (scale == 1).all()
    assert torch.equal(found.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@on_triton
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_keys_that_a_cache_keeps_in_fp8_are_picked_as_if_they_were_rounded_now(backend, triton_device):
    """With room behind each sequence, where there are numbers that are none."""
    inputs = problem(9, keys=40)
    numbers, scale = lightning_indexer_keys(inputs["k"])
    room = numbers.new_full((2, 50, 8), torch.nan), scale.new_full((2, 50), torch.nan)
    for buffer, kept in zip(room, (numbers, scale), strict=True):
        buffer[:, :40] = kept
    device = triton_device if backend == "triton" else "cpu"
    inputs, room = {name: x.to(device) for name, x in inputs.items()}, [x.to(device) for x in room]
    expected = in_fp8(**inputs, topk=7, backend=backend)
    kept = inputs | {"k": room[0][:, :40]}
    assert torch.equal(in_fp8(**kept, topk=7, key_scale=room[1][:, :40], backend=backend), expected)
    apart = room[1][:, :40].contiguous()  # scales that do not lie as the keys do
    assert torch.equal(in_fp8(**kept, topk=7, key_scale=apart, backend=backend), expected)


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

    right = triton_operators.quantised_rows
    monkeypatch.setattr(
        triton_operators,
        "quantised_rows",
        lambda x, w=None: (right(x)[0], torch.ones(x.shape[:-1]) if w is None else w),
    )
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


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (lambda k, s: {"k": k}, {}, "got torch.float8_e4m3fn without key_scale: take both from lightning_indexer_keys"),
        (lambda k, s: {"key_scale": s}, {}, "got torch.float32 with key_scale: take both from"),
        (lambda k, s: {"k": k, "key_scale": s[:, 1:]}, {}, "key_scale"),
        (lambda k, s: {"k": k, "key_scale": s}, {"precision": None}, "key_scale of lightning_indexer belongs to keys"),
    ],
)
def test_keys_in_fp8_come_with_their_scales_and_only_so(made, options, words):
    inputs = problem(3)
    kept = lightning_indexer_keys(inputs["k"])
    with pytest.raises(ValueError, match=words):
        lightning_indexer(**inputs | made(*kept), topk=3, **{"precision": "fp8"} | options)


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
