"""Memory of a process that prepares a large text and trains on it: it does not grow with the text."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data import made_up_text

BPE = (
    *(
        "data.tokens.tokenizer._target_=experiments.data.tokenizers.BPETokenizer",
        "+data.tokens.tokenizer.vocab_size=8192",
    ),
    "arch.width=16",
)


def anonymous_memory(text: Path, *settings: str) -> int:
    """The most memory in bytes, but for mapped files, of a process that prepares a text and trains on it."""
    command = [sys.executable, "-m", "experiments.train", "data=text_files", f"data.path={text}", "budget.flops=1e10"]
    command += [
        "trainer.evaluations=1",
        "trainer.compile=false",
        "session.threads=1",
        f"session.root={text.parent / 'runs'}",
    ]
    environment = os.environ | {"ARCHIPELAGO_CACHE": str(text.parent / "cache"), "OMP_NUM_THREADS": "1"}
    most, running = 0, subprocess.Popen([*command, *settings], env=environment, cwd=Path(__file__).parents[2])
    while running.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{running.pid}/status").read_text())
        most = max(most, 1024 * int(found[1]) if found else 0)
        time.sleep(0.02)
    assert running.returncode == 0
    (row,) = map(json.loads, (text.parent / "runs" / "ledger.jsonl").read_text().splitlines())
    assert row["status"] == "done", row["error"]
    return most


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("small", "large", "settings"), [(1e7, 1e9, ("arch.width=32",)), (1.5e8, 3e8, BPE)], ids=["bytes", "bpe"]
)
def test_a_run_on_a_larger_text_takes_hardly_more_memory(tmp_path, small, large, settings):
    most = {}
    for size in (small, large):
        folder = tmp_path / f"{size:g}"
        folder.mkdir()
        made_up_text.write(folder / "text.jsonl", size)
        most[size] = anonymous_memory(folder / "text.jsonl", *settings)
    assert most[large] < most[small] + 1e8, most
