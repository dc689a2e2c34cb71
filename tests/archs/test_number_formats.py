"""Narrow formats by their tables: every number of them, what lies between, and what they do not have."""

import math

import pytest
import torch

from archs.number_formats import E2M1, E4M3, E5M2, FORMATS, rounded

ELEMENTS = {"e4m3": (E4M3, torch.float8_e4m3fn), "e5m2": (E5M2, torch.float8_e5m2)}
FOURS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # E2M1, in the order of its codes
formats = pytest.mark.parametrize("name", FORMATS)


def table(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a format of torch that is not negative, in the order of its codes."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()]


@pytest.mark.parametrize(
    ("element", "values"),
    [(E4M3, table(torch.float8_e4m3fn)), (E5M2, table(torch.float8_e5m2)), (E2M1, FOURS)],
    ids=["e4m3", "e5m2", "e2m1"],
)
def test_an_element_has_the_numbers_of_its_table_and_takes_the_nearest_of_two_equal_ones_the_even_code(element, values):
    assert values[-1] == element.largest and len(values) in (8, 127, 124)
    middle, codes = (values[:-1] + values[1:]) / 2, torch.arange(len(values))
    for sign in (1, -1):
        assert torch.equal(rounded(sign * values, element), sign * values)
        even = values[torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])]
        assert torch.equal(rounded(sign * middle, element), sign * even)
        up, down = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (math.inf, 0.0))
        assert torch.equal(rounded(sign * up, element), sign * values[1:])
        assert torch.equal(rounded(sign * down, element), sign * values[:-1])
    beyond = torch.tensor([1.01 * element.largest, 1e30, math.inf])
    assert torch.equal(rounded(beyond, element), torch.full((3,), element.largest))
    assert rounded(torch.tensor([math.nan]), element).isnan()


@pytest.mark.parametrize("name", ELEMENTS)
def test_an_element_rounds_as_pytorch_casts(name):
    element, dtype = ELEMENTS[name]
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 5, 100_000)
    cast = x.clamp(-element.largest, element.largest).to(dtype).float()
    assert torch.equal(rounded(x, element), cast)


def quantised(name: str, x: torch.Tensor) -> torch.Tensor:
    return FORMATS[name].quantised(x, FORMATS[name].activations)


@formats
def test_what_is_quantised_stays_so_and_is_near_what_it_was(name):
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    once = quantised(name, x)
    if name != "nvfp4":  # whose scales are rounded, so that the largest number of a block may move
        assert torch.equal(quantised(name, once), once)
    worst = {"fp8_tiles": 1 / 16, "mxfp8": 1 / 8, "mxfp8_e5m2": 1 / 8, "nvfp4": 1 / 3}[name]
    near = x.abs() > 0.3 * x.abs().max()
    assert ((once - x).abs() <= worst * x.abs())[near].all() and (once != x).any()


@formats
def test_a_block_has_the_scale_of_its_largest_number_and_no_other_block_is_moved_by_it(name):
    columns = FORMATS[name].activations[1]
    x = torch.randn(3, 3 * columns, generator=torch.Generator().manual_seed(0))
    outlier = x.clone()
    outlier[1, columns] = 100 * x.abs().max()
    before, after = (quantised(name, y).unflatten(1, (3, columns)) for y in (x, outlier))
    apart = torch.ones(3, 3, dtype=torch.bool)
    apart[1, 1] = False
    if name != "nvfp4":  # which has a scale for all of them
        assert torch.equal(before[apart], after[apart])
    assert after[1, 1, 0].item() == pytest.approx(outlier[1, columns].item(), rel=0.13)
    if name in ("fp8_tiles", "nvfp4"):  # what is below half the least number in this scale
        element = FORMATS[name].element
        least = 2.0 ** (element.least - element.mantissa) * outlier.max() / element.largest
        beside = slice(columns + 1, 2 * columns)
        lost = x[1, beside].abs() < 0.49 * least
        assert lost.any() == (name == "nvfp4") and not after[1, 1, 1:][lost].any()


def test_tiles_of_weights_are_square_and_their_scale_is_a_float32():
    """By a scale of 3, the ones beside 3 * 448 are thirds, of which E4M3 has 0.34375 nearest."""
    x = torch.ones(200, 200)
    x[130, 10] = 3 * 448
    expected = x.clone()
    expected[128:, :128] = 3 * 0.34375
    expected[130, 10] = 3 * 448
    torch.testing.assert_close(FORMATS["fp8_tiles"].quantised(x, (128, 128)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (256.0, 1.0), (255.0, 0.5), (511.0, 1.0), (512.0, 2.0), (1e-45, 2.0**-127), (2.0**127, 2.0**119)],
)
def test_a_scale_of_mxfp8_is_the_power_of_two_of_the_largest_number_which_may_be_cut(largest, scale):
    least = 2.0**-9 * scale  # the least E4M3, in this scale
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 2] = largest, least, least / 2
    expected = [min(rounded(torch.tensor(largest / scale), E4M3).item(), 448) * scale, least, 0]
    assert quantised("mxfp8", x)[0, :3].tolist() == expected


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """By looking at all of a table, in float64."""
    far = (x.double().abs()[..., None] - values.double()).abs()
    code = torch.arange(len(values))
    best = torch.where(far == far.amin(-1, keepdim=True), code + len(values) * (code % 2), 2 * len(values)).argmin(-1)
    return torch.copysign(values[best], x)


def test_blocks_are_scales_times_numbers_of_a_table_as_the_specifications_write_them():
    """OCP MX v1.0, section 6.3; NVIDIA, arXiv 2509.25149, appendix on NVFP4: with scales that encode, s_enc = 6 * 448 /
    the largest number, and reciprocals of theirs that decode."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 64)[:, None]
    blocks = x.unflatten(1, (2, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).double().log2().floor() - 8).float()
    want = nearest(blocks / scale, table(torch.float8_e4m3fn)) * scale
    assert torch.equal(quantised("mxfp8", x), want.flatten(1))

    for row in x.split(4):
        blocks, encode = row.unflatten(1, (4, 16)), 6 * 448 / row.abs().max()
        decode = nearest(blocks.abs().amax(-1, keepdim=True) / 6 * encode, table(torch.float8_e4m3fn)) / encode
        want = nearest(blocks / decode, FOURS) * decode
        torch.testing.assert_close(quantised("nvfp4", row), want.flatten(1), rtol=1e-6, atol=0)


def test_nvfp4_by_hand():
    """Blocks whose largest numbers are 6, 3.1 and 0.001: by the tensor's scale 1/448 theirs are 448, 231.5 and 0.0747,
    of which E4M3 has 448, 224 and 0.078125 nearest."""
    x = torch.zeros(1, 48)
    x[0, :4] = torch.tensor([6.0, 2.4, 2.5, -0.2])
    x[0, 16:19] = torch.tensor([3.1, 1.2, 0.1])
    x[0, 32:34] = torch.tensor([0.001, 0.0004])
    got = quantised("nvfp4", x)
    expected = torch.zeros(1, 48)
    expected[0, :4] = torch.tensor([6.0, 2.0, 2.0, 0.0])
    expected[0, 16:19] = torch.tensor([6.0, 2.0, 0.0]) * 0.5
    expected[0, 32:34] = torch.tensor([6.0, 2.0]) * 0.078125 / 448
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@formats
def test_zeros_stay_zeros_and_blocks_far_below_the_others_vanish_or_not_but_never_become_nan(name):
    assert not quantised(name, torch.zeros(3, 40)).any()
    x = torch.zeros(2, 128)
    x[0, 0], x[1] = 1e30, 1e-30
    got = quantised(name, x)
    assert got.isfinite().all() and got[0, 0] == pytest.approx(1e30, rel=0.13)
    assert not got[1].any() if name == "nvfp4" else got[1, 0] == pytest.approx(1e-30, rel=0.07)
    subnormal = quantised(name, torch.full((1, 5), 1e-40))
    assert subnormal.isfinite().all() and (subnormal <= 1.3e-40).all()


@formats
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(name, value):
    x = torch.ones(2, 130)
    x[1, 3] = value
    assert not quantised(name, x)[1, 3].isfinite()


@formats
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (129, 17), (130, 131)])
def test_sizes_that_no_block_divides_are_as_if_filled_up_with_zeros(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for block in (FORMATS[name].activations, FORMATS[name].weights):
        whole = torch.zeros(256, 256)
        whole[: shape[0], : shape[1]] = x
        got = FORMATS[name].quantised(x, block)
        assert got.shape == shape and torch.equal(got, FORMATS[name].quantised(whole, block)[: shape[0], : shape[1]])
