"""The commands that people run, and the rooms behind them."""

from pathlib import Path

CONFIGS = str(Path(__file__).parents[1] / "configs")
