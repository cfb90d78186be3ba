"""What the status and request files of a run hold; `control` reads and writes them."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from rlhf_ray.cluster.process_identity import ProcessIdentity, identity, is_visible
from rlhf_ray.types import GeneratorStatus

State = Literal["running", "stopped", "finished", "failed", "dead"]


class Driver(ProcessIdentity):
    """The process that drives a run, as written to status.json."""

    host: str


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of a run, as written to status.json and printed by ``status --json``."""

    name: str
    """``run.name``."""
    folder: str
    """``run.dir``, absolute."""
    state: State = "running"
    """stopped: on request; failed: by an error; dead: its driver vanished without reporting."""
    stage: str | None = None
    """The current stage, or the last one."""
    progress: str | None = None
    """Progress of the stage, such as ``120/600 steps``."""
    eta_s: FiniteFloat | None = None
    """Estimated seconds left of the stage."""
    iteration: int | None = None
    """Committed PPO iterations; None until PPO's roles are ready, as are all fields below."""
    iterations: int | None = None
    """Total iterations."""
    reward: float | None = None
    """Mean score of the last iteration."""
    kl: float | None = None
    """Mean KL of the last iteration, nats per sample."""
    version: int | None = None
    """Adapter version that is served."""
    seconds_per_iteration: FiniteFloat | None = None
    """Mean over this process's iterations except the first."""
    generators: tuple[GeneratorStatus, ...] = ()
    """The state of each generator."""
    updated: FiniteFloat = 0.0
    """Unix seconds at which this was written."""
    repeats: bool = False
    """Failed, by an error that the same commit leads to again."""
    message: str | None = None
    """Of the watchdog, about a run that hangs; of the job server, about a driver out of reach."""
    restarts: Mapping[str, int] | None = None
    """Restarts by role, over all processes of the run."""
    effective_time_ratio: FiniteFloat | None = None
    """Useful over wall seconds, over all processes of the run."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunStatus":
        """Return the status of which `asdict` gave ``values``.

        Fields of another kind, such as a text for a number, are left out and named in ``message``.
        """
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        try:
            return _STATUS.validate_python(known)
        except ValidationError as error:
            odd = sorted({str(detail["loc"][0]) for detail in error.errors()})
        rest = {name: value for name, value in known.items() if name not in odd}
        message = f"status.json is damaged; left out: {', '.join(odd)}"
        return _STATUS.validate_python({"name": "-", "folder": "-", **rest, "message": message})


_STATUS = TypeAdapter(RunStatus)


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a running driver, as written to asked.json."""

    stop: bool = False
    """End after the current iteration."""
    now: bool = False
    """Do not finish that either: the driver ends as by SIGTERM."""
    num_generators: int | None = None
    """New number of generators; None: as it is."""
    scalings: int = 0
    """Count of requests for a number: the same number may be requested again after the driver has
    changed it by itself."""


def is_here(driver: Driver) -> bool:
    """Return whether a driver is, or was, a process that can be looked up from this one."""
    return driver["host"] == socket.gethostname() and is_visible(driver)


def this_driver() -> Driver:
    """Return this process."""
    return {**identity(), "host": socket.gethostname()}
