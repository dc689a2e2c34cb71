"""The ledger counts what launches load and store, and continues it to larger problems."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments.bench import countable, ledger

triton = pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in Triton's interpreter")


@triton.jit
def row_sums_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + at, mask=(at < n) & (n > 0), other=0.0), 0)
    tl.store(y + tl.program_id(0), total)


def test_what_two_programs_read_is_asked_for_twice_and_comes_from_memory_once():
    x, y = torch.ones(5), torch.empty(2)
    with ledger.Recorder() as recorder, recorder.of_triton():
        row_sums_kernel[(2,)](x, y, 5, BLOCK=8)
    assert y.tolist() == [5, 5]
    assert recorder.rows == [("row_sums_kernel", 5 * 4 + 2 * 4, 2 * 5 * 4 + 2 * 4)]


def test_views_and_allocations_are_no_launches_and_an_expanded_tensor_weighs_what_it_holds():
    with ledger.Recorder() as recorder:
        torch.empty(7)[None].expand(3, 7).add(torch.ones(3, 1))
    assert recorder.rows == [("aten::ones", 12, 12), ("aten::add.Tensor", 7 * 4 + 12 + 84, 7 * 4 + 12 + 84)]


def test_the_convolution_reads_its_input_once_and_writes_its_output_once():
    B, T, D, W = 1, 64, 16, 4
    passes = ledger.counted("causal_conv1d", T, {"batch": B, "channels": D, "taps": W}, torch.float32)
    moved = ledger.totals(passes["forward"])["forward_kernel"]
    assert moved.launches == 1
    assert 4 * (2 * T * D + W * D) <= moved.memory <= 4 * (2 * T * D + 3 * W * D) + 200


SHAPE = {
    "operation": "causal_conv1d",
    "dtype": "float32",
    "batch": 1,
    "length": 640,
    "channels": 512,
    "smallest": [{"length": 64}, {"channels": 128}],
}


@pytest.mark.thorough
def test_counts_are_continued_to_a_larger_problem_as_they_would_be_counted_there():
    continued = ledger.at_published(SHAPE)
    counted = ledger.counted("causal_conv1d", 640, {"batch": 1, "channels": 512}, torch.float32)
    assert continued == {name: ledger.totals(rows) for name, rows in counted.items()}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smallest": [{"length": 20}, {"channels": 128}]}, "enlarge `smallest`"),
        (
            {"operation": "ssd", "heads": 4, "groups": 2, "smallest": [{"length": 16}, {"heads": 2, "groups": 2}]},
            "must be one number",
        ),
    ],
)
def test_a_problem_that_cannot_be_continued_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ledger.at_published(SHAPE | change)


@pytest.mark.thorough
def test_the_command_writes_whole_passes_beside_the_peers_and_every_launch(bench, capsys):
    shape = "{operation: causal_conv1d, dtype: float32, batch: 1, length: 640, channels: 256, "
    shape += "smallest: [{length: 64}, {channels: 128}], peers: {another: {forward: 0.25}}}"
    path, found, text = bench("launches=published", f"launches.shapes=[{shape}]")
    assert path.as_posix() == "results/bench/ledger.json" and text in capsys.readouterr().out
    rows = {(row["pass"], row["launch"]): row for row in found["rows"]}
    for passed in ("forward", "backward"):
        parts = [row for (of, launch), row in rows.items() if of == passed and launch not in ("all", "at least")]
        assert rows[passed, "all"]["memory"] == sum(row["memory"] for row in parts)
        assert 0 < rows[passed, "at least"]["memory"] <= rows[passed, "all"]["memory"]
    assert "another 0 MB, 0.000 ms" in text and "| forward_kernel | 1 |" in text


def test_an_unknown_operation_is_refused_by_name(bench, capsys):
    with pytest.raises(SystemExit):
        bench("launches=published", "launches.shapes=[{operation: conv}]")
    assert "no operation 'conv': choose from gated_delta_rule" in capsys.readouterr().err


def test_even_picks_exist_and_name_every_key_so_that_chance_moves_no_byte():
    sizes = {"batch": 1, "heads": 2, "head_dim": 4, "kv_heads": 1, "value_dim": 4, "picked": 6, "keys": 16}
    indices = countable.even_picks(4, **sizes, generator=torch.Generator())["indices"]
    assert indices.unique().tolist() == list(range(16))
    assert all(len(row.unique()) == 6 for row in indices[0])


@pytest.mark.thorough
def test_blocks_of_unequal_size_are_continued_as_they_would_be_counted(monkeypatch):
    """Seven queries in blocks of three: 3, 3 and 1."""
    shape = {"operation": "latent_attention", "dtype": "bfloat16", "batch": 1, "length": 7, "keys": 32, "heads": 2}
    shape |= {"head_dim": 32, "value_dim": 16, "picked": 32}
    sizes = {key: value for key, value in shape.items() if key not in ("operation", "dtype", "length")}
    monkeypatch.setattr("kernels.sparse.triton_operators.WORKSPACE", 3 * 32 * (32 + 2 * 2) * 2)
    counted = ledger.counted("latent_attention", 7, sizes, torch.bfloat16)
    assert ledger.totals(counted["backward"])["sums_kernel"].launches == 3
    continued = ledger.at_published(shape | {"smallest": [{"length": 1}, {"keys": 16, "picked": 16}]})
    assert continued == {name: ledger.totals(rows) for name, rows in counted.items()}


ROOT = Path(__file__).parents[2]
SHAPES = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/launches/published.yaml").shapes)
QUICK = ("gated_delta_step", "lightning_indexer, decoding")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=[] if ledger.name_of(s) in QUICK else pytest.mark.slow) for s in SHAPES],
    ids=ledger.name_of,
)
def test_the_committed_ledger_is_what_the_kernels_move(shape):
    rows = json.loads((ROOT / "results/bench/ledger.json").read_text())["rows"]
    assert [row for row in rows if row["operation"] == ledger.name_of(shape)] == ledger.by_launch(shape)
