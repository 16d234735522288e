"""From `--config run.yaml --field value ...` to validated dataclasses.

YAML values are turned into the same tokens as a command line and put before the real one, so there is one conversion
of types and the command line wins. An unknown key or flag is refused with the nearest known name; one of open-r1's that
means nothing here is accepted with a warning (`open_r1_keys.py`). A key `env:` in the YAML sets environment variables
(those of libraries that read them when they are imported, such as HF_ENDPOINT, belong into the shell). `--parse_only`
prints the resolved configuration as YAML and ends. Types, `--help` and choices come from transformers'
HfArgumentParser.
"""

import copy
import dataclasses
import json
import logging
import os
from argparse import ArgumentParser
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from sft_core.run.open_r1_keys import FOREIGN_KEYS
from sft_core.run.options import known_names, nearest, warn_foreign

logger = logging.getLogger(__name__)


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print its whole usage first
        raise ValueError(f"{message} (see --help)")

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        field = copy.copy(field)
        metadata = {name: value for name, value in field.metadata.items() if name != "bounds"}  # unknown to argparse
        field.metadata = MappingProxyType(metadata)
        HfArgumentParser._parse_dataclass_field(parser, field)


def parse(config_types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """One validated instance of each dataclass type; with `--parse_only`, prints them as YAML and exits with 0.

    Raises:
        ValueError: unknown key or flag, unreadable YAML, or a value that a dataclass refuses.
    """
    first = Parser(None, add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--parse_only", action="store_true")
    ours, argv = first.parse_known_args(argv)
    if len(ours.config) > 1:
        raise ValueError(f"--config is given {len(ours.config)} times: put all into one file.")
    path = ours.config[0] if ours.config else None
    known = known_names(*config_types)
    tokens = []
    for key, value in (_read_yaml(path) if path else {}).items():
        if key == "env":
            os.environ.update({name: str(text) for name, text in (value or {}).items()})
        elif key in FOREIGN_KEYS and key not in known:
            warn_foreign(key)
        elif key not in known:
            raise ValueError(f"unknown key `{key}` in {path}{nearest(key, known)}")
        else:
            tokens += _as_tokens(key, value, known[key])
    *configs, remaining = Parser(config_types, allow_abbrev=False).parse_args_into_dataclasses(
        [*tokens, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    foreign = False  # values that follow a key of others go with it
    for text in remaining:
        name = text.lstrip("-").split("=")[0].replace("-", "_")
        if text.startswith("--"):
            foreign = name in FOREIGN_KEYS
        if not foreign:
            raise ValueError(f"unknown flag `{text}`{nearest(name, known)}")
        if text.startswith("--"):
            warn_foreign(name)
    if ours.parse_only:
        if os.environ.get("RANK", "0") == "0":
            print(as_yaml([config.frozen() for config in configs]), end="")
        raise SystemExit(0)
    return tuple(configs)


def as_yaml(configs: list[Any]) -> str:
    """The resolved options of all dataclasses as one YAML recipe, which parses to the same again."""
    options = {field.name for config in configs for field in dataclasses.fields(config) if field.init}
    values = {
        key: value
        for config in configs
        for key, value in dataclasses.asdict(config).items()
        if key in options and value != []
    }
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"there is no recipe at {path}: check --config.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    return content


def _as_tokens(key: str, value: Any, field: dataclasses.Field) -> list[str]:
    if value is None:
        if field.default is not None and os.environ.get("RANK", "0") == "0":
            logger.warning("`%s` without a value leaves its default, %s.", key, field.default)
        return []
    if value == []:
        empty = field.default_factory is not dataclasses.MISSING and field.default_factory() == []
        return [] if empty else [f"--{key}", "none"]  # `report_to` knows none; a reward of that name is refused
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]
