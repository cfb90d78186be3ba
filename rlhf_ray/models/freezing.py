"""Training some modules of a model and leaving the others as they are."""

import difflib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from rlhf_ray.errors import ConfigError


def train_only(model: Any, prefixes: Sequence[str], key: str) -> None:
    """Freeze all but the modules that begin with one of the prefixes, in place.

    Weights that two modules share are trained where either of them is.

    Args:
        model: not wrapped.
        prefixes: names of modules, such as ``transformer.h.11`` (which is not ``transformer.h.1``).
        key: of the config, for the message.

    Raises:
        ConfigError: a prefix that no parameter of the model has.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = []
    for prefix in prefixes:
        found = [p for name, p in named if f"{name}.".startswith(f"{prefix}.")]
        if not found:
            raise ConfigError(_no_such(prefix, [name for name, _ in named], key))
        chosen += found
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


def _no_such(prefix: str, names: Sequence[str], key: str) -> str:
    known = {
        module for name in names for module in accumulate(name.split("."), lambda a, b: f"{a}.{b}")
    }
    near = difflib.get_close_matches(prefix, sorted(known), n=4)
    heads = sorted({name.split(".")[0] for name in names})
    hint = f"near are {', '.join(near)}" if near else f"they begin with {' or '.join(heads)}"
    return f"{key}: no module of the model is named {prefix!r}; {hint}"
