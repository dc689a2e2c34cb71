"""What the commands share where they meet a person: what was given, what is printed, and the end after a mistake."""

import sys
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console


def given(config: DictConfig) -> dict[str, Any]:
    """Returns a command's settings in Python's own types.

    Raises:
        ValueError: for one that must be given and is not.
    """
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = error.full_key or "name"
        raise ValueError(f"{name} must be given, as {name}=...") from error
    return settings


def console(width: int = 150) -> Console:
    """Returns the console to print on; what goes into a file has lines of `width`, whatever a terminal has."""
    out = Console(soft_wrap=True)
    if not out.is_terminal:
        out.width = width
    return out


def stop(message: object) -> NoReturn:
    """End with a line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
