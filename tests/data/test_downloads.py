import numpy as np
import pytest

from experiments.data import downloads
from experiments.data.token_bins import token_bins
from tests.data.hub import serving

TOKENS = np.random.default_rng(0).integers(0, 256, 30_000).astype(np.uint16)
FILES = {"train 1.bin": TOKENS[:9_999], "train 2.bin": TOKENS[9_999:], "val.bin": TOKENS[:3000]}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "BLOCK", 4096)
    with serving("nobody/nothing", {name: tokens.tobytes() for name, tokens in FILES.items()}) as server:
        yield server


def shards(server):
    train = [f"{server.url}/train%20{number}.bin" for number in (2, 1)]
    settings = {"heldout_tokens": 3000, "vocab_size": 257, "eot": 256, "bytes_per_token": 4.0}
    return token_bins(train=train, val=f"{server.url}/val.bin", format="nanogpt", **settings)


def test_shards_are_downloaded_once_and_mapped_in_the_order_of_their_names(server):
    data = shards(server)
    assert np.array_equal(data.train[:], TOKENS) and np.array_equal(data.heldout, TOKENS[:3000])
    assert all(isinstance(part, np.memmap) for part in data.train.parts)
    asked = len(server.asked)
    assert asked == sum(-(-2 * len(tokens) // 4096) for tokens in FILES.values())
    assert shards(server).digest == data.digest and len(server.asked) == asked


def test_a_download_that_breaks_off_is_a_sentence_and_is_made_again_while_whole_files_stay(server, tmp_path):
    server.broken = {12}  # the third block of the second file
    with pytest.raises(
        ValueError, match=r"train%201.bin cannot be downloaded \(Client.*whole files are kept"
    ) as refused:
        shards(server)
    assert "\n" not in str(refused.value)
    kept = [path for path in (tmp_path / "cache" / "files").iterdir() if path.suffix != ".lock"]
    assert [path.name.endswith("train%25202.bin") for path in kept] == [True]
    assert np.array_equal(shards(server).train[:], TOKENS)
    assert server.asked.count("train 2.bin") == -(-2 * len(FILES["train 2.bin"]) // 4096)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{server}/train*.bin", "URLs have no patterns; name each file"),
        ("{server}/none.bin", r"none.bin cannot be downloaded \(FileNotFoundError: "),
        ("http://127.0.0.1:9/a.bin", r"a.bin cannot be downloaded \("),
        ("nosuch://bucket/a.bin", r"cannot be downloaded \(ValueError: Protocol not known: nosuch\)"),
        ("{server}/" + "a" * 300, "download it, and name what is there"),
    ],
)
def test_what_cannot_be_downloaded_is_said_in_a_sentence(server, url, words):
    with pytest.raises(ValueError, match=words) as refused:
        downloads.downloaded(url.format(server=server.url))
    assert "\n" not in str(refused.value)


def test_a_server_that_gives_no_parts_of_files_is_refused(server):
    server.ranges = False
    with pytest.raises(
        ValueError, match=r"val.bin cannot be downloaded \(ValueError: 6000 bytes came for 0 to 4096 of 6000"
    ):
        downloads.downloaded(f"{server.url}/val.bin")
