"""Functions of the user's own, named in the config."""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ray.errors import ConfigError, RlhfError

NOT_THE_USERS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parent),
    "<",
)
"""How the file names of code begin that is the libraries' or ours."""


def load_function(spec: str, key: str) -> Callable[..., Any]:
    """Return the function that ``module:name`` or ``path/to/file.py:name`` names.

    Where it ends its process, the function raises an RlhfError instead.

    Raises:
        ConfigError: no such module, file or function, or the module raises when it is imported.
    """
    where, _, name = spec.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _import(where)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
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
    return _without_exit(function, f"{key}: {spec}")


def _without_exit(function: Callable[..., Any], described: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: object, **named: object) -> object:
        try:
            return function(*args, **named)
        except SystemExit as error:
            raise RlhfError(
                f"{described} raised SystemExit: {error.code} ({users_line(error, function)}), "
                "which would end the run; let it return or raise another error"
            ) from None

    return guarded


def users_line(error: BaseException, function: Callable[..., Any]) -> str:
    """Return file and line of the user's last frame; where the function starts if there is none.

    The last frame of all may lie in a library that the user's line called.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    home = code.co_filename if code else None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == home or not frame.filename.startswith(NOT_THE_USERS):
            return f"{frame.filename}, line {frame.lineno}"
    return f"{home}, line {code.co_firstlineno}" if code else repr(function)


def _import(name: str) -> ModuleType:
    """Import a module, also from the working directory, as Python does for a script there."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """Load a file as a module, which may import what stands beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: a file there must not stand for a library
    found = PathFinder.find_spec(path.stem)
    is_free = found is not None and found.origin == str(path)
    name = path.stem if is_free else f"users_{path.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    spec.loader.exec_module(module)
    return module
