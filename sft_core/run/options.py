"""The base of all configurations: flat dataclasses with one field per option, checked when they are made.

A configuration is a plain dataclass, so that users can subclass it and assign to it. A run takes a copy (`frozen`),
which is checked again and cannot be changed. Types, bounds and choices are checked in Python as on the command line
(`sft_core/run/cli.py`), and assigning to a name that is not an option is an error.
"""

import copy
import dataclasses
import difflib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, pass_over

T = TypeVar("T")
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class JsonDict(dict):
    """A dict that can also be given as a JSON object in text."""


def as_json(text: str) -> Any:
    """The JSON object in `text`. Other text is returned as it is, for the type check to refuse."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        return text
    return JsonDict(parsed) if isinstance(parsed, dict) else text


class _OptionsType(type):
    """Makes the constructor of a configuration also accept aliases and the keys of `open_r1_keys.py`."""

    def __call__(cls: type[T], *args: Any, **given: Any) -> T:
        named = [(option_name(cls, name, value), value) for name, value in given.items()]
        check_once([name for name, _ in named])
        return type.__call__(cls, *args, **{name: value for name, value in named if name is not None})


class Options(metaclass=_OptionsType):
    """Base of all configurations. Subclasses extend `check`, and `resolve` if an option has several spellings."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError with one sentence if values are wrong or contradict each other."""
        check_options(self)

    def check_given(self) -> None:
        """Raise ValueError if a required option is missing. A script may still assign it: only `frozen` calls this."""

    def resolve(self) -> None:
        """Replace the several spellings of an option by one value."""

    def frozen(self) -> Self:
        """A copy for a run: checked, resolved, and read-only."""
        config = copy.copy(self)
        config.check_given()
        config.check()
        config.resolve()
        vars(config)["_frozen"] = True
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in vars(self):
            raise AttributeError(f"{name} cannot be changed during a run: set it before train()")
        types = option_types(type(self))
        known = name if name in types else option_name(type(self), name, value)
        if known is not None:
            vars(self)[known] = _converted(value, types[known])


def option(
    default: Any,
    help: str,
    alias: str | None = None,
    choices: tuple[str, ...] | None = None,
    commas: bool = False,
    **bounds: float,
) -> Any:
    """A dataclass field with its one-line documentation, from which the option tables are generated.

    `alias`: another name for recipes; `choices`: the allowed texts, also for each entry of a list; `commas`: a
    comma-separated text, to which a repeated option is appended; `bounds`: ge, gt, le, lt as in pydantic, and le=inf if
    the value may be infinite. `check_options` checks choices and bounds. None is allowed if the type includes it.
    """
    metadata: dict[str, Any] = {"help": help, "bounds": bounds}
    metadata |= {"aliases": [f"--{alias}"]} if alias else {}
    metadata |= {"choices": choices} if choices else {}
    metadata |= {"commas": True} if commas else {}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def known_names(*kinds: Any) -> dict[str, dataclasses.Field]:
    """Every option of these configurations, by its name and its aliases."""
    return {
        name: field
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.init
        for name in (field.name, *(alias[2:] for alias in field.metadata.get("aliases", [])))
    }


def option_name(kind: type, name: str, value: Any) -> str | None:
    """The option of this name or alias; None for a key of another library that `open_r1_keys.pass_over` accepts.

    Raises:
        ValueError: there is no such option, or it is refused.
    """
    known = known_names(kind)
    if name in known:
        return known[name].name
    if name not in FOREIGN_KEYS and name not in REFUSED_KEYS:
        raise ValueError(f"{kind.__name__} has no option `{name}`{nearest(name, known)}")
    pass_over(name, value)
    return None


def check_once(names: Sequence[str | None]) -> None:
    """Raise ValueError if an option is given under two of its names, since one value would be lost."""
    for name in names:
        require(name is None or names.count(name) == 1, f"{name} is given twice, under two of its names: give it once.")


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean `{close[0]}`?" if close else ": see --help for every option."


def check_options(config: Any) -> None:
    """Raise ValueError for an option of a wrong type, or outside the bounds or choices of its field."""
    types = option_types(config.__class__)
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        require(
            value is not None or is_a(None, types[name]),
            f"{name} must have a value, not null: leave it out to take its default.",
        )
        require(is_a(value, types[name]), f"{name} must be {_words(types[name])}, got {value!r}.")
        if value is None:
            continue
        bounds = field.metadata.get("bounds", {})
        require(bounds.get("le") == math.inf or _is_finite(value), f"{name} must be finite, got {value}.")
        for bound, limit in bounds.items():
            holds, words = BOUNDS[bound]
            require(holds(value, limit), f"{name} must be {words} {limit}, got {value}.")
        if choices := field.metadata.get("choices"):
            for text in value if isinstance(value, list) else [value]:
                require(text in choices, f"{name} must be one of {', '.join(choices)}, got {text!r}.")


def _is_finite(value: Any) -> bool:
    """Whether every number in `value` is finite."""
    if isinstance(value, Mapping | list):
        return all(map(_is_finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, float) or math.isfinite(value)


@cache
def option_types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _converted(value: Any, kind: Any) -> Any:
    """Convert `value` as the command line does: one value becomes a list of one, and a bool becomes a text for a text
    option. `~/` is replaced by the home folder, and a folder's trailing slash is removed."""
    kinds = alternatives(kind)
    if isinstance(value, str) and (value.startswith("~/") or os.path.isdir(value)):
        return os.path.expanduser(value).rstrip("/") or value
    if isinstance(value, bool) and str in kinds and bool not in kinds:
        return str(value).lower()
    if isinstance(value, str) and JsonDict in kinds:
        return as_json(value)
    if isinstance(value, str | int | float) and not is_a(value, kind) and any(get_origin(k) is list for k in kinds):
        return [value]
    return value


def alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_a(value: Any, kind: Any) -> bool:
    """Whether `value` has the annotated type. An int also counts as a float; a bool does not count as a number."""
    origin, parts = get_origin(kind), get_args(kind)
    if len(kinds := alternatives(kind)) > 1:
        return any(is_a(value, part) for part in kinds)
    if origin is Literal:
        return value in parts
    if origin in (list, tuple):
        return isinstance(value, origin) and all(is_a(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if kind is JsonDict:
        return isinstance(value, Mapping)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if len(kinds := alternatives(kind)) > 1:
        return " or ".join(_words(part) for part in kinds if part is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is list:
        return f"a list in which each entry is {_words(parts[0])}"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", JsonDict: "a JSON object"}
    return words.get(kind, str(kind))


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def option_table(config_type: type, base: type | None = None) -> str:
    """The option table of a configuration in Markdown, one row per option, without unchanged options of `base`."""
    inherited = {f.name: (f.default, f.metadata["help"]) for f in dataclasses.fields(base)} if base else {}
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for f in (f for f in dataclasses.fields(config_type) if f.init):
        default = default_of(f)
        if inherited.get(f.name) == (f.default, f.metadata["help"]):
            continue
        shown = "required" if default == "" else " ".join(default) if isinstance(default, list) else default
        rows.append(f"| `{f.name}` | {shown} | {f.metadata['help'].replace('|', '/')} |")
    return "\n".join(rows)
