"""Keys of TRL's and open-r1's configurations (and of accelerate's files) that are no options here: `open_r1_keys.yaml`.

`FOREIGN_KEYS` are passed over with one line that says what to use instead: whatever they say, what is trained is the
same. `REFUSED_KEYS` would change it, or ask for what is not here: ValueError with the reason. A value that means what
is done anyway is accepted in silence, so that a whole configuration can be pasted: the default that TRL or open-r1 give
the key (`trl_defaults.json`, names and defaults alone), and those of `also_fine`. Every other key is unknown, which
`cli.py` and `options.py` say with the nearest name. `grpo_core/OPTIONS.md` lists them all.
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
# Of which library, of which class, by name.
TRL_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("trl_defaults.json").read_text()
)


def defaults_there(config_type: type, libraries: Iterable[str] = TRL_DEFAULTS) -> dict[str, Any]:
    """What the options of the classes of that name are where nobody sets them; a later library's are before."""
    kinds = [kind.__name__ for kind in config_type.__mro__]
    found = [TRL_DEFAULTS[library].get(kind, {}) for library in libraries for kind in kinds]
    return {name: default for names in found for name, default in names.items()}


def pass_over(name: str, value: Any) -> None:
    """Accept a key of others: in silence where `value` is what is done anyway, else with one line.

    Raises:
        ValueError: it would change what is trained, or asks for what is not here.
    """
    defaults = [names[name] for library in TRL_DEFAULTS.values() for names in library.values() if name in names]
    fine = [None, "none", *defaults, *_KEYS["also_fine"].get(name, [])]
    if any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in fine):
        return
    if name in REFUSED_KEYS:
        raise ValueError(f"`{name}: {value}` cannot be had: {REFUSED_KEYS[name]}.")
    if os.environ.get("RANK", "0") == "0":
        logger.warning("`%s` has no meaning here and is passed over: %s.", name, FOREIGN_KEYS[name])
