"""Parses `--config run.yaml --field value ...` into validated dataclasses.

* Values in the YAML file replace an option's default, and flags override both. Text in the YAML is converted as on the
  command line. The dataclass checks types, bounds and choices. `null` or `none` leaves a number unset.
* An unknown key or flag is refused, and the error names the nearest known name. `open_r1_keys.py` handles names of TRL
  and open-r1 that are not options here.
* A key `env:` in the YAML sets environment variables. Variables that libraries read on import, such as HF_ENDPOINT,
  must be set in the shell.
* `--parse_only` prints the resolved configuration as YAML, with comments for the defaults that differ from TRL's, and
  exits.

transformers' HfArgumentParser provides types, `--help` and choices.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sft_core.run.distributed import usage_errors
from sft_core.run.open_r1_keys import FOREIGN_KEYS, REFUSED_KEYS, defaults_there, pass_over
from sft_core.run.options import JsonDict, Options, as_json, check_once, default_of, known_names, nearest, require


class _Repeated(argparse.Action):
    """Appends the values of a repeated option to its list, or to its comma-separated text; a default is replaced."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if before is not self.default:
            values = f"{before},{values}" if isinstance(values, str) else [*before, *values]
        setattr(namespace, self.dest, values)


class Parser(HfArgumentParser):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-3 for a flag
        self.register("type", JsonDict, as_json)
        for kind in (int, float):
            self.register("type", kind, lambda text, kind=kind: None if text in ("null", "none") else kind(text))

    def error(self, message: str) -> NoReturn:  # argparse would print its whole usage first
        raise ValueError(f"{message} (see --help)")

    def add_argument(self, *names: Any, bounds: Any = None, commas: bool = False, **options: Any) -> Any:
        """`bounds`: the dataclass checks them."""
        if commas or options.get("nargs") == "+":
            options["action"] = _Repeated
        return super().add_argument(*names, **options)


def parse(config_types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """One validated instance of each dataclass type; with `--parse_only`, prints them as YAML and exits with 0.

    Raises:
        ValueError: unknown key or flag, unreadable YAML, or a value that a dataclass refuses.
    """
    first = Parser(None, add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--parse_only", action="store_true")
    known = known_names(*config_types)
    others = [name for name in (*FOREIGN_KEYS, *REFUSED_KEYS) if name not in known]
    for name in others:
        first.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, nargs="*", type=_load)
    ours, argv = first.parse_known_args(argv)
    if len(ours.config) > 1:
        raise ValueError(f"--config is given {len(ours.config)} times: merge the files into one.")
    path = ours.config[0] if ours.config else None
    given: dict[str, Any] = {}
    recipe, texts = _read_yaml(path) if path else ({}, {})
    for key, value in recipe.items():
        if key == "env":
            env = texts[key] or {}
            sound = isinstance(env, dict) and all(isinstance(text, str) for text in env.values())
            require(sound, f"`env` in {path} must hold `NAME: value` lines.")
            os.environ.update(env)
        elif key in known:
            check_once([*given, known[key].name])
            given[known[key].name] = value, texts.get(key, value)
        elif key in others:
            pass_over(key, value)
        else:
            raise ValueError(f"unknown key `{key}` in {path}{nearest(str(key), known)}")
    parser = Parser(config_types, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in given:
            value, text = given[action.dest]  # `no` and `1e-3` stay text for a text option
            meant = isinstance(value, bool | float) and action.type not in (None, string_to_bool, int, float)
            action.default, action.required = text if meant else value, False
    *configs, remaining = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    for text in remaining[:1]:
        raise ValueError(f"unknown flag `{text}`{nearest(text.split('=')[0].lstrip('-').replace('-', '_'), known)}")
    for name in others:
        if (values := getattr(ours, name)) is not None:
            pass_over(name, values if len(values) > 1 else values[0] if values else True)
    if ours.parse_only:
        if os.environ.get("RANK", "0") == "0":
            print(as_yaml([c.frozen() if isinstance(c, Options) else c for c in configs]), end="")
            print(
                "# Defaults that differ from those of TRL 1.16 and open-r1:", *map(_differences, config_types), sep=""
            )
        raise SystemExit(0)
    return tuple(configs)


class TrlParser:
    """TRL's parser, for scripts: `TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()`."""

    def __init__(self, dataclass_types: Any) -> None:
        self.types = (dataclass_types,) if isinstance(dataclass_types, type) else tuple(dataclass_types)

    def parse_args_and_config(self, args: list[str] | None = None) -> tuple[Any, ...]:
        """An instance of each class. On the command line (`args` is None) an error prints one line and exits with 2."""
        if args is not None:
            return parse(self.types, args)
        with usage_errors():
            return parse(self.types, sys.argv[1:])


def as_yaml(configs: list[Any]) -> str:
    """The resolved options of all dataclasses as one YAML recipe, which parses to the same options again."""
    options = {field.name for config in configs for field in dataclasses.fields(config) if field.init}
    values = {
        key: dict(value) if isinstance(value, dict) else value
        for config in configs
        for key, value in dataclasses.asdict(config).items()
        if key in options
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _differences(config_type: type) -> str:
    """The defaults that differ from TRL's and open-r1's, one comment per line."""
    there, lines = defaults_there(config_type, ("trl 1.16.0", "open_r1")), []
    for name, field in known_names(config_type).items():
        ours, theirs = default_of(field), there.get(name)
        if name in there and ours != theirs and (ours, theirs) != ("", None):  # "" is a name that must be given
            lines.append(f"\n#   {name}: {json.dumps(ours)} instead of {json.dumps(theirs)}")
    return "".join(lines)


class _Loader(yaml.SafeLoader):
    """Reads 1e-7 as a number, as in YAML 1.2, and refuses repeated keys; YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            require(keys.count(key) == 1, f"the recipe has `{key}` twice: give it once.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(text: str | bytes, what: str = "it", loader: Any = _Loader) -> Any:
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}; correct it.") from error


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's content, and the same content with all values as text."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no recipe at {path}: check --config.")
    content, texts = (_load(file.read_bytes(), path, loader) for loader in (_Loader, yaml.BaseLoader))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines: check --config.")
    return content, texts
