"""FineWeb-Edu as it is read from the Hugging Face hub, from a server that the test starts."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.data.token_data import prepare
from experiments.data.tokenizers import BPETokenizer
from experiments.harness.run import execute
from tests.data.hub import Hub, serving

CARD = """---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
TEXTS = [f"document {i}: {' '.join(str(i * j % 997) for j in range(60))}\n" for i in range(3000)]
READ = 400_000  # bytes, which end in the second file
SMALL = (
    *("data=fineweb_edu", f"data.tokens.corpus.max_bytes={READ}", "data.tokens.tokenizer.vocab_size=300"),
    *("data.tokens.heldout_bytes=2000", "data.tokens.heldout_fraction=0.05", "session.threads=1"),
)


@pytest.fixture
def hub():
    files = {"README.md": CARD.encode()}
    for number, part in enumerate(np.array_split(TEXTS, 3)):
        table = pa.table({"text": part.tolist(), "score": [3.0] * len(part)})
        parquet.write_table(table, buffer := io.BytesIO(), row_group_size=100)
        files[f"sample/10BT/{number:03d}_00000.parquet"] = buffer.getvalue()
    with serving("HuggingFaceFW/fineweb-edu", files) as hub:
        yield hub


@pytest.fixture
def run_python(hub: Hub, tmp_path, monkeypatch):
    """Runs Python where this server is the hub, which is settled when the hub's library is first imported."""
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path / "cache"))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    return run


class Documents:
    """The texts that a run reads, without a hub."""

    name = "fineweb-edu"

    def fingerprint(self) -> str:
        return "documents"

    def documents(self):
        size = 0
        for text in TEXTS:
            if (size := size + len(text)) > READ:
                return
            yield text.encode()


@pytest.mark.thorough
def test_a_run_streams_through_broken_connections_and_goes_on_to_the_token_without_the_hub(
    hub, run_python, make_run, tmp_path, first_steps, killed_at
):
    hub.broken = {2, 5}  # the README is 0 and the first file's end is 1
    small = [*SMALL, "arch.width=16", "budget.flops=1e9", "trainer.evaluations=1", "data.sequence_length=32"]
    small += ["session.progress=false", "session.checkpoint_seconds=0"]
    done = run_python("-m", "experiments.train", *small, f"session.root={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without sending complete message body") == 2
    assert not [path for path in hub.asked if "002" in path], "read more than max_bytes"
    hub.gone = set(hub.files)
    truth = json.loads((tmp_path / "whole" / "ledger.jsonl").read_text())
    there = prepare(Documents(), BPETokenizer(300), 2000, 0.05, tmp_path / "there")
    assert truth["data_digest"] == there.digest

    run = make_run(*small)
    assert run.id == truth["id"]
    with killed_at(7):
        execute(run)
    row = execute(run)
    assert first_steps == [0, 7], "started from the beginning"
    assert (row["bits_per_byte"], row["train_loss"]) == (truth["bits_per_byte"], truth["train_loss"])


@pytest.mark.thorough
def test_a_data_set_that_breaks_off_for_good_is_one_sentence_and_nothing_is_kept(hub, run_python, tmp_path):
    code = (
        "from hydra import compose, initialize_config_dir; from experiments.harness.parts import open_data\n"
        f"with initialize_config_dir({str(Path(__file__).parents[2] / 'configs')!r}, version_base='1.3'):\n"
        f"    config = compose('train', {list(SMALL)!r})\n"
        "try:\n    print(open_data(config).digest)\nexcept ValueError as error:\n    print('refused:', error)"
    )
    hub.gone = {"sample/10BT/001_00000.parquet"}
    refused = run_python("-c", code).stdout
    assert refused.startswith("refused: data set HuggingFaceFW/fineweb-edu cannot be read (") and "403" in refused
    assert refused.count("\n") == 1
    assert any("000" in path for path in hub.asked), "nothing was read before"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    hub.gone = set()
    there = prepare(Documents(), BPETokenizer(300), 2000, 0.05, tmp_path / "there")
    assert run_python("-c", code).stdout == there.digest + "\n"
