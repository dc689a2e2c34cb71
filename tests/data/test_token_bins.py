import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.token_bins import Chained, read_shard, token_bins
from experiments.data.tokenizers import BPETokenizer
from experiments.data.windows import TrainWindows
from experiments.harness.budget import Allocation
from experiments.harness.data_module import DataModule, TrainBatches

TOKENS = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint16)


def write(path, tokens, format, magic=20240520, version=1, promised=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    path.write_bytes((header.tobytes() if format == "llm.c" else b"") + tokens.tobytes())
    return str(path)


@pytest.fixture(params=["nanogpt", "llm.c"])
def shards(request, tmp_path):
    for i, part in enumerate(np.split(TOKENS, [30_000, 30_001, 70_000])):
        write(tmp_path / f"train_{i}.bin", part, request.param)
    write(tmp_path / "val.bin", TOKENS[:5000], request.param)
    return {"train": f"{tmp_path}/train_*.bin", "val": f"{tmp_path}/val.bin", "format": request.param}


def test_shards_of_both_formats_are_one_stream(shards):
    data = token_bins(**shards, heldout_tokens=4000, vocab_size=257, eot=256, bytes_per_token=4.5)
    assert len(data.train) == 100_000 and np.array_equal(data.train[:], TOKENS)
    assert np.array_equal(data.heldout, TOKENS[:4000])
    assert data.heldout_bytes == 18_000 and (data.vocab_size, data.eot) == (257, 256)
    assert data.decode([65, 256, 66]) == "<65>\n<eot>\n<66>"


def test_windows_are_the_same_from_one_shard_and_from_many(shards):
    data = token_bins(**shards, heldout_tokens=4000, vocab_size=257, eot=256, bytes_per_token=1.0)
    many, one = (TrainWindows(train, 64, seed=1).batch(0, 500) for train in (data.train, TOKENS))
    assert many.tolist() == one.tolist()


def test_batches_after_a_stop_are_those_that_were_to_come_across_shards_and_passes(shards):
    """With every seam of shards inside of a window that is read after the stop."""
    data = token_bins(**shards, heldout_tokens=4000, vocab_size=257, eot=256, bytes_per_token=1.0)
    allocation = Allocation(sequences=2500, steps=50, sequence_length=64, flops_per_token=1.0)

    def batches(start: int) -> list[list]:
        return [batch.tokens_BT.tolist() for batch in TrainBatches(DataModule(data, allocation, 3, False, 8), start)]

    whole, rest = batches(0), batches(17)
    assert len(whole) == 50 and rest == whole[17:]
    read = {tuple(window) for batch in rest for window in batch}
    for seam in (30_000, 30_001, 70_000):
        start = seam // 64 * 64
        assert start < seam and tuple(TOKENS[start : start + 64].tolist()) in read


def test_shards_of_ten_billion_tokens_are_read_in_little_memory(tmp_path):
    for name, tokens in (("train_0", 4_000_000_001), ("train_1", 6_000_000_000), ("val", 5000)):
        (tmp_path / f"{name}.bin").touch()
        os.truncate(tmp_path / f"{name}.bin", 2 * tokens)  # which takes no room on the disk
    train, val = f"{tmp_path}/train_*.bin", f"{tmp_path}/val.bin"
    tracemalloc.start()
    data = token_bins(train, val, "nanogpt", heldout_tokens=4000, bytes_per_token=4.0)
    batch = TrainWindows(data.train, 1024, seed=0).batch(1_000_000, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) == 10_000_000_001 and batch.shape == (64, 1024) and not batch.any()
    assert peak < 20e6


@given(cuts=st.lists(st.integers(0, 40), max_size=5), start=st.integers(0, 45), length=st.integers(0, 45))
@settings(deadline=None, max_examples=100)
def test_slices_of_a_chain_are_those_of_the_whole(cuts, start, length):
    whole = np.arange(40, dtype=np.uint16)
    chain = Chained(np.split(whole, sorted(cuts)))
    assert len(chain) == 40 and chain.dtype == whole.dtype
    assert np.array_equal(chain[start : start + length], whole[start : start + length])


def test_a_slice_inside_one_shard_is_not_copied():
    parts = [np.arange(10), np.arange(10)]
    assert np.shares_memory(Chained(parts)[12:15], parts[1]) and np.shares_memory(Chained(parts)[2:10], parts[0])


def test_a_chain_refuses_slices_with_a_step():
    with pytest.raises(ValueError, match="step 1, not 2"):
        Chained([np.arange(4)])[::2]


def test_a_tokenizer_counts_the_held_out_bytes_exactly(tmp_path, shards):
    text = b"the quick brown fox jumps over the lazy dog\n" * 20
    tokenizer = BPETokenizer(280).fit([text], tmp_path)
    (ids,) = tokenizer.encode([text])
    shards["val"] = write(tmp_path / "text.bin", np.append(ids, tokenizer.eot).astype(np.uint16), shards["format"])
    settings = {"heldout_tokens": len(ids) + 1, "vocab_size": 280, "eot": tokenizer.eot}
    data = token_bins(**shards, **settings, tokenizer=tmp_path / "tokenizer.json")
    assert data.heldout_bytes == len(text)
    assert data.decode(data.heldout) == text.decode() + "\n<eot>\n"
    with pytest.raises(ValueError, match="has 280 ids and eot=0, and the shards vocab_size=281 and eot=0"):
        token_bins(**shards, **settings | {"vocab_size": 281}, tokenizer=tmp_path / "tokenizer.json")


def test_the_digest_follows_both_parts_and_the_vocabulary(tmp_path, shards):
    def digest(**changed):
        common = {"heldout_tokens": 4000, "vocab_size": 257, "eot": 256, "bytes_per_token": 4.0}
        return token_bins(**{**shards, **common, **changed}).digest

    digests = [digest(), digest(heldout_tokens=3999), digest(vocab_size=258), digest(bytes_per_token=4.1)]
    assert digest() == digests[0]
    changed = TOKENS[30_001:70_000].copy()
    changed[-1] ^= 1
    write(tmp_path / "train_2.bin", changed, shards["format"])
    assert len({*digests, digest()}) == 5


@pytest.mark.parametrize(
    ("write_as", "read_as", "header", "message"),
    [
        ("llm.c", "nanogpt", {}, "has the header of an llm.c shard: set format=llm.c"),
        (
            "nanogpt",
            "llm.c",
            {},
            "does not start with llm.c's header of 256 int32 and its magic number 20240520",
        ),
        ("llm.c", "llm.c", {"magic": 20240801}, "does not start with llm.c's header"),
        ("llm.c", "llm.c", {"version": 7}, "version 7; only version 1"),
        ("llm.c", "llm.c", {"promised": 101}, "has 1224 bytes, and its header promises 101 tokens"),
        ("llm.c", "csv", {}, "format='csv' must be 'nanogpt'"),
    ],
)
def test_a_shard_that_is_not_of_its_format_is_named(tmp_path, write_as, read_as, header, message):
    path = tmp_path / "odd.bin"
    write(path, TOKENS[:100], write_as, **header)
    with pytest.raises(ValueError, match=message) as refused:
        read_shard(path, read_as)
    assert read_as == "csv" or "odd.bin" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_file_that_is_no_whole_number_of_tokens_is_named(tmp_path, content):
    (tmp_path / "odd.bin").write_bytes(content)
    for format in ("nanogpt", "llm.c"):
        with pytest.raises(ValueError, match="odd.bin"):
            read_shard(tmp_path / "odd.bin", format)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bytes_per_token": None}, "exactly one of bytes_per_token=.* and tokenizer="),
        ({"tokenizer": "t.json"}, "exactly one of bytes_per_token=.* and tokenizer="),
        ({"train": "nothing*.bin"}, r"no file matches 'nothing\*.bin'"),
        ({"heldout_tokens": 5001}, "has 5000 tokens, fewer than heldout_tokens=5001"),
        ({"heldout_tokens": 0}, "heldout_tokens=0"),
        ({"eot": 300}, "eot=300"),
        ({"vocab_size": 70000}, "at most 65536"),
        ({"bytes_per_token": -1.0}, "bytes_per_token=-1.0"),
        ({"vocab_size": 200, "eot": 0}, "holds id 255, and vocab_size=200"),
    ],
)
def test_arguments_that_cannot_work_are_refused(shards, changed, message):
    common = {"heldout_tokens": 4000, "vocab_size": 257, "eot": 256, "bytes_per_token": 4.0}
    with pytest.raises(ValueError, match=message):
        token_bins(**{**shards, **common, **changed})


def test_training_shards_are_checked_against_the_vocabulary_too(tmp_path, shards):
    write(tmp_path / "train_1.bin", np.array([999], np.uint16), shards["format"])
    with pytest.raises(ValueError, match="train_1.bin holds id 999, and vocab_size=257"):
        token_bins(**shards, heldout_tokens=4000, vocab_size=257, eot=256, bytes_per_token=4.0)
