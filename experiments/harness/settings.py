"""The settings that a run may have: types and bounds of what is no part's own, and each part's by its signature."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pydoc import ErrorDuringImport, locate
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from experiments.harness.origin import targets
from experiments.terminal import nearest

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PARTS = ("archs", "objectives", "experiments.data")  # of which a config of anybody may build what it likes
PARTS += tuple(f"experiments.harness.{name}" for name in ("optimisers", "schedules", "trainer"))
WORDS = {
    "value_error": "{error}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be finite",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list, as in [1,2]",
    "sequence_str": "must be a list, as in [a,b]",
    "dict_type": "must be settings, as in {{name:value}}",
    "literal_error": "must be one of {expected}",
    "too_short": "must have at least {min_length} of them",
    "missing": "must be given",
    "none_required": "must be null",
}


class Settings(BaseModel):
    """A node of the config. What it does not name passes, since it is a part's own or a user's."""

    model_config = STRICT | ConfigDict(extra="allow")


class Closed(BaseModel):
    """A node of the config that has no other settings."""

    model_config = STRICT | ConfigDict(extra="forbid")


class ArchSettings(Settings):
    width: Count
    width_multiple: Count


class ScoringSettings(Closed):
    prompts: Count
    samples: Count
    sampler: dict[str, Any] | None = None


class DataSettings(Settings):
    sequence_length: Count
    allow_repeats: bool
    packed: bool
    scoring: ScoringSettings | None = None
    accuracy: Count | None = None


class BudgetSettings(Closed):
    flops: Positive
    batch_tokens: Positive | None


class TrainerSettings(Settings):
    devices: Count = 1
    nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    experts: Count = 1
    microbatch: Count | None = None
    recompute: bool = False


def folder(root: str) -> str:
    if "://" in root:
        raise ValueError("must be a folder: python -m experiments.merge brings its runs to an object store, and back")
    return root


class SessionSettings(Closed):
    root: Annotated[str, AfterValidator(folder)]
    kind: str
    arm: str
    older: Literal["refuse", "accept", "replace"]
    checkpoint_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    threads: Count | Literal["auto"]
    progress: bool


class RunSettings(Settings):
    """The config of a run with its session."""

    arch: ArchSettings
    data: DataSettings
    budget: BudgetSettings
    trainer: TrainerSettings
    seed: Seed
    session: SessionSettings


def conform(model: type[BaseModel], settings: Mapping[str, Any], path: str = "") -> None:
    """Check settings against a schema.

    Raises:
        ValueError: for the first that does not fit: its name, its value, and what is allowed.
    """
    try:
        model.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_sentence(error, path)) from None


def conform_part(node: Mapping[str, Any], path: str) -> None:
    """Check what a node with a `_target_`, and each such node in it, hands to the parameters of its target.

    Raises:
        ValueError: for a target that there is none of, for a setting that is no parameter, and for one whose value is
            not of the parameter's type.
    """
    for name, value in node.items():
        below = f"{path}.{name}" if path else name
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, Mapping):
                conform_part(child, below)
    if "_target_" not in node:
        return
    if not isinstance(node["_target_"], str):
        raise ValueError(f"{path}._target_={node['_target_']!r} must be text, the name of what is built")
    try:
        checks, more = _parameters(node["_target_"])
    except ValueError as error:
        raise ValueError(f"{path}._target_={node['_target_']!r} {error}") from None
    for name, value in node.items():
        if name.startswith("_") or any(targets(value)):
            continue
        if name not in checks and not more:
            raise ValueError(f"{path}.{name} is no setting of {node['_target_']}{nearest(name, list(checks))}")
        try:
            checks.get(name, _anything)(value)
        except ValidationError as error:
            raise ValueError(_sentence(error, f"{path}.{name}")) from None


def check_settings(config: Mapping[str, Any]) -> None:
    """Check what is no part's own in the config of a run.

    Raises:
        ValueError: as `conform` does.
    """
    conform(RunSettings, config)


def check_parts(config: Mapping[str, Any]) -> None:
    """Check what the config of a run hands to its parts, which are imported for it.

    Raises:
        ValueError: as `conform_part` does.
    """
    for name, node in config.items():
        if isinstance(node, Mapping):
            conform_part(node, name)


def check_run(config: Mapping[str, Any]) -> None:
    """Check the whole config of a run, before anything is loaded for it.

    Raises:
        ValueError: as `check_settings` and `check_parts` do.
    """
    check_settings(config)
    check_parts(config)


def check_stranger(node: Any, trusted: Collection[str] = (), path: str = "") -> None:
    """Check a config that somebody else may have written: that it builds parts of this project, which open no door to
    anything else, or things of the packages that are trusted. Nothing is imported to find that out but those.

    Raises:
        ValueError: for the first `_target_` that is something else, and a place to write to.
    """
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        below = f"{path}.{name}" if path else str(name)
        if name == "cache_dir":
            raise ValueError(
                f"{below}={value!r} is a place to write to, which a config of somebody else may not choose"
            )
        if isinstance(value, (Mapping, list)):
            check_stranger(value, trusted, below)
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target is None or str(target).partition(".")[0] in trusted:
        return
    module = str(target).rpartition(".")[0]
    known = any(module == part or module.startswith(f"{part}.") for part in PARTS)
    if not known or getattr(locate(target), "__module__", None) != module:
        raise ValueError(
            f"{path}._target_={target!r} is no part of this project: whoever wrote that config could run anything by "
            f"it. trusted=[{str(target).partition('.')[0]}] allows what you know"
        )


@cache
def _parameters(target: str) -> tuple[dict[str, Callable[[Any], Any]], bool]:
    """Returns a check of each parameter of a target, which raises ValidationError, and whether it takes any others."""
    try:
        found: Any = locate(target)
    except ErrorDuringImport as error:
        raise ValueError(f"cannot be imported: {error.value!r}") from None
    if not callable(found):
        raise ValueError("is nothing that can be built: name a class or a function of a module")
    signature = inspect.signature(found)
    try:
        hints = get_type_hints(found.__init__ if inspect.isclass(found) and "__init__" in vars(found) else found)
    except (NameError, TypeError):
        hints = {}
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return {name: _check(hints.get(name, Any)) for name in signature.parameters}, inspect.Parameter.VAR_KEYWORD in kinds


def _check(hint: Any) -> Callable[[Any], Any]:
    """Returns what raises ValidationError for values that are not of a type; for types of which no value can be checked
    before it is built, what raises nothing."""
    for config in (STRICT, None):  # some types bring a config of their own
        try:
            check = TypeAdapter(hint, config=config).validate_python
        except Exception:  # pydantic raises errors of its own for what it has no schema of
            continue
        if get_origin(hint) is tuple:
            return lambda value: check(tuple(value) if isinstance(value, list) else value)
        return check
    return _anything


def _anything(value: Any) -> None:
    pass


def _sentence(error: ValidationError, path: str) -> str:
    """The first mistake: name=value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    place = path
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and not part.startswith(("function-", "is-instance")):
            place += f".{part}" if place else part
    if first["type"] == "missing" and not isinstance(first["loc"][-1], str):
        return f"{path}={list(first['input'])} has too few entries"
    if first["type"] == "missing":
        return f"{place} must be given, as {place}=..."
    if first["type"] == "extra_forbidden":
        return f"{place} is no setting that there is: leave it out"
    words = WORDS.get(first["type"], first["msg"][:1].lower() + first["msg"][1:])
    return f"{place}={first['input']!r} {words.format(**first.get('ctx', {}))}"
