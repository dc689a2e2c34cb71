"""The commands that people run, and the rooms behind them."""

import os
from pathlib import Path

CONFIGS = str(Path(__file__).parents[1] / "configs")

# How often OpenMP's threads look for each other before they sleep. With the default of 300,000 two threads beside
# another busy process were 30 to 60 times slower than one; this loses nothing on a quiet one (docs/measurements.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
