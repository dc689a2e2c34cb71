"""The planted sweeps, shared with the tests of the analysis."""

from tests.scaling.conftest import make_sweep, reported

__all__ = ["make_sweep", "reported"]
