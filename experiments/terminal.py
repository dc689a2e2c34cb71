"""The commands' common side towards a person: what was given, what is printed, and the end after a mistake."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from rich.console import Console

from experiments import CONFIGS

FULL = "HYDRA_FULL_ERROR"
TRACEBACKS = os.environ.get(FULL) == "1"  # set by a person who wants to see where an error comes from
INTERRUPTED = 130  # the exit code that shells give for it
ROOT = Path(__file__).parents[1]
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)


def command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[..., None]]:
    """Make a function the command whose settings are configs/<name>.yaml. A mistake ends it with one sentence on stderr
    and exit code 2; a fault of the program shows its traceback."""

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[..., None]:
        @wraps(function)
        def job(config: DictConfig) -> Any:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                return function(config)  # in a worker: what goes wrong is its launcher's to say
            with mistakes_in_a_sentence():
                return function(config)

        main = hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(job)

        @wraps(function)
        def run(config: DictConfig | None = None) -> None:
            """Run on the command line's settings, or on a config that is composed already."""
            before = os.environ.get(FULL, "0")
            os.environ[FULL] = "1"  # Hydra raises then, and else writes twelve lines
            try:
                with stopped_in_a_sentence(), mistakes_in_a_sentence():
                    main() if config is None else function(config)
            finally:
                os.environ[FULL] = before

        return run

    return decorate


@contextmanager
def stopped_in_a_sentence() -> Iterator[None]:
    """End with a line that says what is kept where the command is interrupted or told to terminate."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    listening = current_thread() is main_thread()  # Python hands signals to no other
    before = signal.signal(signal.SIGTERM, interrupt) if listening else None
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: what is finished is kept; start the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if listening:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def mistakes_in_a_sentence() -> Iterator[None]:
    """End with a sentence where a mistake is raised within; a fault of the program goes on as it is."""
    try:
        yield
    except MISTAKES as error:
        if TRACEBACKS or (said := sentence(error)) is None:
            raise
        stop(said)


def sentence(error: BaseException) -> str | None:
    """Returns what is wrong and what to do, for a mistake in what was given; None for a fault of the program."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        return f"{group}={name} is not known{nearest(name, list(error.options or []))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write name=value, with quotes around what has spaces or brackets"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return sentence(error.__cause__)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} must be given, as {cause.full_key}=..."
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and not isinstance(cause, InterpolationKeyError):
        known = [] if cause.parent_node is None else [str(key) for key in cause.parent_node if key != "hydra"]
        more = f"; a parameter that the config leaves out: +{cause.full_key}=..." if "_target_" in known else ""
        known = [key for key in known if not key.startswith("_")]
        return f"{cause.full_key} is no setting{nearest(str(cause.key), known)}{more}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return str(error).splitlines()[0]
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        return f"{error.strerror}: what is finished is kept" if error.errno == errno.ENOSPC else None
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(ROOT) and "site-packages" not in Path(last.filename).parts
    return str(error) if ours and (last.line or "").startswith("raise") else None


def nearest(name: str, known: list[str]) -> str:
    """Returns the end of a sentence about a name that is not known: the one that was meant, or all that are known."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else f": choose one of {', '.join(sorted(known))}" if known else ""


def given(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Returns settings in Python's own types, with all that they refer to.

    Raises:
        MissingMandatoryValue: for one that must be given and is not.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
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
