"""Functions of the user's own, named in the config."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError


def load_function(spec: str, key: str) -> Callable[..., Any]:
    """Return the function that ``module:name`` or ``path/to/file.py:name`` names.

    Raises:
        ConfigError: no such module, file or function, or the module raises when it is imported.
    """
    where, _, name = spec.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _import(where)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"{key}: {spec} cannot be loaded ({type(error).__name__}: {error}); name a module "
            "that can be imported here, or a file by path/to/file.py:name"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{key}: {spec}: {where} has no function {name}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return function


def _import(name: str) -> ModuleType:
    """Import a module, also from the working directory, as Python does for a script there."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
