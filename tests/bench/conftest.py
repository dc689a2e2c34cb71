"""The command of the benchmarks, run inside the process of the tests."""

import json
import logging
import runpy
import sys

import pytest


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Arguments of `python -m experiments.bench` -> the name of the only table that it wrote, its rows and its text."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def run(*arguments: str):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["experiments.bench", *arguments])
        runpy.run_module("experiments.bench", run_name="__main__")
        (table,) = tmp_path.rglob("*.json")
        return table.relative_to(tmp_path), json.loads(table.read_text()), table.with_suffix(".md").read_text()

    yield run
    root.setLevel(level)  # Hydra has put its own in their place
    root.handlers[:] = handlers
