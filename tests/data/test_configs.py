from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.data.token_data import TokenData
from experiments.harness.identity import plain

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml") if path.stem != "base")
PATHS = dict.fromkeys(["text_files", "mixture", "chat", "chat_filled", "preferences"], "data.path")
MISSING = PATHS | {"token_bins": "data.tokens.train"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path / "cache"))


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=[f"data={name}", *overrides]).data


@pytest.mark.parametrize("name", NAMES)
def test_every_data_config_has_what_the_harness_reads(name):
    config = composed(name)
    assert config.name == name and config.sequence_length >= 1 and config.allow_repeats is False
    if name in MISSING:
        with pytest.raises(ValueError, match=f"^{MISSING[name]} must be given"):
            plain(config)
    else:
        plain(config)


@pytest.mark.thorough
def test_the_standard_library_is_data_on_any_machine():
    small = ["data.tokens.heldout_bytes=20000"]
    by_byte = instantiate(composed("python_stdlib", *small).tokens)
    assert isinstance(by_byte, TokenData) and by_byte.vocab_size == 257 and len(by_byte.train) > 5e6
    assert 19_997 <= by_byte.heldout_bytes <= 20_000


@pytest.mark.slow
def test_the_standard_library_gives_the_same_held_out_bytes_in_a_bpe_vocabulary():
    by_byte, by_bpe = (instantiate(composed(name).tokens) for name in ("python_stdlib", "python_stdlib_bpe"))
    assert by_bpe.vocab_size == 4096
    assert by_byte.decode(by_byte.heldout) == by_bpe.decode(by_bpe.heldout)
    assert by_byte.heldout_bytes == by_bpe.heldout_bytes


def test_text_files_are_named_and_read_from_the_command_line(tmp_path):
    for i in range(400):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * 200)
    config = composed("text_files", f"data.path=['{tmp_path}/*.txt']", "data.name=mine")
    data = instantiate(config.tokens)
    assert data.name == "mine/bytes" and data.heldout_bytes == 65536


@pytest.mark.thorough
def test_text_of_your_own_is_mixed_with_the_standard_library(tmp_path):
    (tmp_path / "my.txt").write_text("".join(f"line number {i}\n" for i in range(50_000)))
    data = instantiate(composed("mixture", f"data.path={tmp_path}/my.txt").tokens)
    assert data.name == "mixture(own/bytes 0.5, python_stdlib/bytes 0.5)" and data.heldout_bytes == 65536
    ours = ["line number" in data.decode(data.train[i : i + 128]) for i in range(0, 128 * 2000, 128)]
    assert 0.45 < np.mean(ours) < 0.55


def test_token_bins_are_named_and_read_from_the_command_line(tmp_path):
    np.arange(50_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(2000, dtype=np.uint16).tofile(tmp_path / "val.bin")
    globs = [f"data.tokens.{part}=['{tmp_path}/{part}*.bin']" for part in ("train", "val")]
    rest = [
        "data.tokens.format=nanogpt",
        "data.tokens.heldout_tokens=2000",
        "data.tokens.bytes_per_token=4.2",
    ]
    data = instantiate(composed("token_bins", *globs, *rest).tokens)
    assert (len(data.train), data.heldout_bytes, data.vocab_size) == (50_000, 8400, 50257)


def test_the_synthetic_language_follows_the_sequence_length():
    config = composed("hidden_markov", "data.sequence_length=48", "data.tokens.train_tokens=4800")
    assert config.tokens.sequence_length == 48
    data = instantiate(config.tokens)
    assert (len(data.train), data.vocab_size, data.eot) == (4800, 33, 32)
