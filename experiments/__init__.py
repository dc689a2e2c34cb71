"""What people run: the commands, and the rooms behind them."""

import sys
from pathlib import Path
from typing import NoReturn

CONFIGS = str(Path(__file__).parents[1] / "configs")


def stop(message: object) -> NoReturn:
    """End with a line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
