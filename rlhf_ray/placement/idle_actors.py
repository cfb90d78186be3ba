"""Actors between two stages: begun before theirs, or left to the next one.

They lie on the driver's own machine and hold nothing but memory: no slot, nothing that others wait
for. They end with Ray's session.
"""

from functools import partial
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.placement.groups import live_nodes

Made = tuple[type, tuple[object, ...]]
"""Class and arguments of an actor."""


class IdleActors:
    """Actors by name, with what they were made of."""

    def __init__(self) -> None:
        self._actors: dict[str, tuple[Made, Any, object]] = {}

    def add(self, name: str, made: Made, actor: Any, loading: object = None) -> None:
        """Keep an actor; ``loading`` is its call that loads a model, which ends with its handle."""
        self._actors[name] = made, actor, loading

    def take(self, name: str, made: Made) -> tuple[Any, bool]:
        """Return the actor of this name, None if there is none, and whether it was made alike."""
        known, actor, _ = self._actors.pop(name, (None, None, None))
        return actor, _values(known) == _values(made)

    def clear(self) -> None:
        """Forget all: they have ended."""
        self._actors.clear()


IDLE = IdleActors()


def needs_no_slots(config: Config) -> bool:
    """Return whether a run's processes hold nothing that others wait for.

    That is so on a machine of its own without GPUs: there they may start before their stage.
    """
    is_own = config.cluster.runs_on_ray and not config.cluster.joins_cluster
    may_be = is_own and not config.placement.gpus
    return may_be and not any(live.node.gpus for live in live_nodes())


def _values(made: object) -> object:
    """Return what can be compared: a partial function equals none but itself."""
    if isinstance(made, partial):
        return made.func, _values(made.args), made.keywords
    return [*map(_values, made)] if isinstance(made, tuple | list) else made
