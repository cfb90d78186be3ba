"""Process titles: each actor's name, version and current phase.

`ps`, `nvidia-smi` and the workers in Ray's dashboard show ``ray::policy-0 v37 learning``. Lines
that the actor writes to stderr have the same prefix. Look there to see which actor is stuck, and in
which phase.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private.ray_constants import LOG_PREFIX_ACTOR_NAME

from rlhf_ray import stacks
from rlhf_ray.cluster.life_signs import STARTING, LifeSigns
from rlhf_ray.cluster.orphans import ProcessRecord, clean_up
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.phases import report

IDLE = "idle"

DOES = {
    "start": STARTING,
    "generate": "generating",
    "publish": "loading",
    "score": "scoring",
    "logprobs": "scoring",
    "ref_logprobs": "scoring",
    "sample_kl": "scoring",
    "values": "scoring",
    "assemble": "assembling",
    "learn": "learning",
    "state": "committing",
    "load": "restoring",
    "adapter": "publishing",
    "stop": "stopping",
}
"""Method -> phase shown while it runs; other methods are shown by name."""
CLEANS_UP = "RLHF_RAY_CLEANS_UP"
"""Variable of actors on nodes that no driver cleans up."""


def titled(role_class: type) -> type:
    """Return a subclass whose process title shows which public method is running.

    The version in the title is the instance's ``version``, if it has one.
    """

    class Titled(role_class):
        def __init__(self, name: str, *args: Any) -> None:
            stacks.register()
            is_actor = ray.is_initialized()  # else asking for the id would start a cluster
            signs = LifeSigns(ray.get_runtime_context().get_actor_id() if is_actor else None)
            record = None
            if is_actor and CLEANS_UP in os.environ:
                with suppress(ConfigError):  # a full disk must not keep a role from starting
                    clean_up()
                    record = ProcessRecord()
            super().__init__(name, *args)
            self.title = _Title(name, self, signs, record)

    for name, method in inspect.getmembers(role_class, inspect.isfunction):
        if not name.startswith("_"):
            setattr(Titled, name, _showing(method, DOES.get(name, name)))
    # Ray's dashboard and errors name the class by these.
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Titled, attribute, getattr(role_class, attribute))
    return Titled


class _Title:
    """The title of this process; of overlapping calls it shows the one that began last."""

    def __init__(
        self, name: str, actor: Any, signs: LifeSigns, record: ProcessRecord | None
    ) -> None:
        self.name = name
        self._actor = actor
        self._signs = signs
        self._record = record
        self._doing: list[str] = []
        self._show()

    @contextmanager
    def showing(self, doing: str) -> Iterator[None]:
        self._doing.append(doing)
        self._show()
        try:
            yield
        finally:
            self._doing.remove(doing)
            if doing == STARTING:
                report("")  # its last phase is over, and calls report units of work
                if self._record is not None:
                    with suppress(ConfigError):
                        self._record.settle()  # its engine's processes and shared memory are there
            self._show()

    def _show(self) -> None:
        version = getattr(self._actor, "version", None)
        self._signs.doing = (self._doing or [IDLE])[-1]
        parts = [self.name, "" if version is None else f"v{version}", self._signs.doing]
        title = " ".join(filter(None, parts))
        ray._raylet.setproctitle(f"ray::{title}")  # type: ignore[attr-defined]
        # After each call Ray resets the title to the name of the instance's class, so the class
        # is renamed as well.
        type(self._actor).__name__ = title
        # Ray's log monitor takes this line as the prefix of those that follow it.
        print(f"{LOG_PREFIX_ACTOR_NAME}{title}", file=sys.stderr, flush=True)


def _showing(method: Callable[..., Any], doing: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def waited_for(self: Any, *args: Any) -> Any:
            with self.title.showing(doing):
                return await method(self, *args)

        return waited_for

    @functools.wraps(method)
    def called(self: Any, *args: Any) -> Any:
        with self.title.showing(doing):
            return method(self, *args)

    return called
