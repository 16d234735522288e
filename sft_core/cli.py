"""From `--config run.yaml --field value ...` to validated dataclasses.

YAML values are turned into the same tokens as a command line and put before the real one, so there is one conversion
of types and the command line wins. An unknown key or flag is refused with the nearest known name. A key `env:` in the
YAML sets environment variables. Types, `--help` and choices come from transformers' HfArgumentParser.
"""

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


def parse(config_types: tuple[type, ...], argv: list[str]) -> tuple[Any, ...]:
    """One validated instance of each dataclass type.

    Raises:
        ValueError: unknown key or flag, unreadable YAML, or a value that a dataclass refuses.
    """
    path, argv = _take_config_path(argv)
    known = [field.name for config_type in config_types for field in dataclasses.fields(config_type)]
    tokens = []
    for key, value in (_read_yaml(path) if path else {}).items():
        if key == "env":
            os.environ.update({name: str(text) for name, text in value.items()})
        elif key not in known:
            raise ValueError(f"unknown key `{key}` in {path}{_nearest(key, known)}")
        else:
            tokens += _as_tokens(key, value)
    parser = HfArgumentParser(config_types, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print its whole usage first
    *configs, remaining = parser.parse_args_into_dataclasses(
        [*tokens, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    for text in remaining:
        name = text.lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(f"unknown flag `{text}`{_nearest(name, known)}")
    return tuple(configs)


def _take_config_path(argv: list[str]) -> tuple[str | None, list[str]]:
    for i, text in enumerate(argv):
        if text == "--config":
            if i + 1 == len(argv):
                raise ValueError("--config needs the path of a YAML file.")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if text.startswith("--config="):
            return text.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return None, argv


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


def _as_tokens(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message} (see --help)")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean `{close[0]}`?" if close else ": see --help for every option."
