"""Handles keys of TRL's, open-r1's and accelerate's configurations that are not options here (`open_r1_keys.yaml`).

`FOREIGN_KEYS` do not change what is trained. They are ignored, with one line that says what to use instead.
`REFUSED_KEYS` would change what is trained, or ask for something that is not supported; they raise ValueError with the
reason. A value that changes nothing here is accepted silently, so that a whole configuration can be pasted.
Such values are the key's default in TRL or open-r1 (`trl_defaults.json` holds only names and defaults), and those of
`also_fine`. Every other key is unknown; `cli.py` and `options.py` report it with the nearest name.
`grpo_core/OPTIONS.md` lists all keys.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

_KEYS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
FOREIGN_KEYS: dict[str, str] = {key: group["why"] for group in _KEYS["passed_over"] for key in group["keys"]}
REFUSED_KEYS: dict[str, str] = {key: group["why"] for group in _KEYS["refused"] for key in group["keys"]}
# Library -> class -> option -> default.
TRL_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("trl_defaults.json").read_text()
)


def defaults_there(config_type: type, libraries: Iterable[str] = TRL_DEFAULTS) -> dict[str, Any]:
    """The defaults of the classes with the names of `config_type` and its bases; a later library overrides earlier."""
    kinds = [kind.__name__ for kind in config_type.__mro__]
    found = [TRL_DEFAULTS[library].get(kind, {}) for library in libraries for kind in kinds]
    return {name: default for names in found for name, default in names.items()}


def pass_over(name: str, value: Any) -> None:
    """Accept a key of another library: silently if `value` changes nothing here, else with one warning line.

    Raises:
        ValueError: the key would change what is trained, or asks for something that is not supported.
    """
    defaults = [names[name] for library in TRL_DEFAULTS.values() for names in library.values() if name in names]
    fine = [None, "none", *defaults, *_KEYS["also_fine"].get(name, [])]
    if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in fine):
        return
    if name in REFUSED_KEYS:
        raise ValueError(f"`{name}: {value}` is not supported: {REFUSED_KEYS[name]}.")
    if os.environ.get("RANK", "0") == "0":
        logger.warning("`%s` has no effect here and is ignored: %s.", name, FOREIGN_KEYS[name])
