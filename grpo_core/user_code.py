"""Imports custom functions, which are named `module:function` on the command line."""

import importlib
from collections.abc import Callable
from typing import Any


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The function named `module:function`. `what` names its purpose in the message of a ValueError."""
    module, _, attribute = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # custom code may raise anything
        raise ValueError(f"cannot import the {what} {path!r} (it must be module:function): {error!r}") from error
    if isinstance(function, type) or not callable(function):
        kind = type(function).__name__
        raise ValueError(f"the {what} {path!r} is a {kind}, not a function (name an instance of a class)")
    return function
