"""How others talk with a run's driver: through two small files in the run's folder.

    driver --> status.json --> whoever asks
    driver <-- asked.json  <-- whoever asks

Both are written whole. They are the same with and without Ray, they outlive the driver, and need
no process of their own. From another machine `cluster.job_server` has this module read and write
them on the driver's node, as a job of a second: ``python -m rlhf_ray.runs.control``.
"""

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.cluster.orphans import alive, identity, write_whole
from rlhf_ray.cluster.own_job import folder_of_job, make_known, note_folder
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.progress import Bar, Progress, watched_by
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.types import GeneratorStatus

INTERVAL_S = 1.0
"""Between two looks of the driver at what is asked of it."""

LIFE_SIGN_S = 20.0
"""At most between two changes of the status while its driver lives."""
SILENT_S = 60.0
"""After how long without a change the driver of another host is taken to be gone."""

_telling = threading.Lock()

State = Literal["running", "stopped", "finished", "failed", "dead"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How a run stands."""

    name: str
    """``run.name``."""
    folder: str
    """``run.dir``, absolute."""
    state: State = "running"
    """stopped: on request; failed: by an error; dead: its driver is gone without a word."""
    stage: str | None = None
    """The stage that it is in, or was in last."""
    progress: str | None = None
    """How far the stage is, such as ``120/600 steps``."""
    eta_s: float | None = None
    """Seconds left of the stage."""
    iteration: int | None = None
    """Iterations of PPO that are committed; None until PPO's roles are ready, like all below."""
    iterations: int | None = None
    """Iterations in all."""
    reward: float | None = None
    """Mean score of the last iteration."""
    kl: float | None = None
    """Mean KL of the last iteration, nats a sample."""
    version: int | None = None
    """Adapter version that is served."""
    seconds_per_iteration: float | None = None
    """Mean of this process's iterations but the first."""
    generators: tuple[GeneratorStatus, ...] = ()
    """Each generator."""
    updated: float = 0.0
    """Unix seconds at which this was written."""
    message: str | None = None
    """What the job server says of a run whose driver cannot be asked any more."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunStatus":
        """The inverse of `asdict`."""
        given: dict[str, Any] = dict(values)
        given["generators"] = tuple(GeneratorStatus(**each) for each in values["generators"])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a running driver."""

    stop: bool = False
    """End after the iteration that it is in."""
    num_generators: int | None = None
    """Change the number of generators to this; None: no wish."""
    scalings: int = 0
    """How often that was asked for: the same number may be asked for again."""


class ControlFiles:
    """The two files of a run."""

    def __init__(self, folder: Path) -> None:
        self._status, self._asked = folder / "status.json", folder / "asked.json"

    def open(self, name: str) -> None:
        """Begin a run of this process: what was told and asked before is void.

        Raises:
            ConfigError: another process runs here.
        """
        self.require_free()
        self._asked.unlink(missing_ok=True)
        driver = identity() | {"host": socket.gethostname()}
        self._write_status(RunStatus(name, str(self._status.parent)), driver)

    def require_free(self) -> None:
        """Refuse a folder that another process writes to.

        Raises:
            ConfigError: it runs, here or on another host.
        """
        try:
            driver, state = self.driver(), self.status().state
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            return  # no run's, or not to be read
        is_other = (driver["host"], driver["pid"]) != (socket.gethostname(), os.getpid())
        if is_other and state == "running" and self._is_driven_by(driver):
            raise ConfigError(
                f"{self._status.parent} is in use by process {driver['pid']} on "
                f"{driver['host']}: stop it first (rlhf-ray stop {self._status.parent}), or "
                "choose another run.dir"
            )

    def _is_driven_by(self, driver: dict[str, Any]) -> bool:
        """Whether the driver of a run whose state is running lives.

        On another host only its signs of life tell, which are waited for: hosts' clocks may differ
        too much to go by the age of the last one.
        """
        if driver["host"] == socket.gethostname():
            return True  # as its state says
        Progress().say(
            f"{self._status.parent} was left running by a driver on {driver['host']}: looking "
            f"for up to {SILENT_S:g} s whether it lives"
        )
        before, deadline = None, time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError, ConfigError):  # as it is replaced, on some storage
                status = self.status()
                if before is not None and status != before:
                    return status.state == "running"
                before = status
            time.sleep(INTERVAL_S)
        self.tell(state="dead")
        return False

    def begin(self, stage: str) -> None:
        """Nothing is known yet of a stage that begins."""
        unknown = {f.name: f.default for f in fields(RunStatus) if f.default is not MISSING}
        self.tell(**unknown | {"stage": stage})

    def tell(self, **changes: Any) -> None:
        """Change fields of the status. No run ends because it is gone or cannot be written."""
        with suppress(OSError, ValueError, TypeError, KeyError, ConfigError), _telling:
            written = self._read()
            self._write_status(replace(_status_in(written), **changes), written["driver"])

    def _write_status(self, status: RunStatus, driver: dict[str, Any]) -> None:
        values = asdict(replace(status, updated=time.time()))
        write_whole(self._status, {"status": values, "driver": driver})

    def status(self) -> RunStatus:
        """How the run stands.

        Raises:
            ConfigError: no run has written here.
        """
        written = self._read()
        status, driver = _status_in(written), written["driver"]
        here = driver["host"] == socket.gethostname()
        if status.state == "running" and here and alive(driver) is None:
            return replace(status, state="dead")
        return status

    def driver(self) -> dict[str, Any]:
        """Which process drives the run: host, pid, started, name."""
        return self._read()["driver"]

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._status.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{self._status.parent} holds no run that was started: it has no "
                f"{self._status.name}; see rlhf-ray list for the runs of a cluster"
            ) from None

    def ask(self, *, stop: bool = False, num_generators: int | None = None) -> None:
        """Leave a wish for the driver, beside what was asked before."""
        before = self.asked()
        wish = replace(before, stop=stop or before.stop)
        if num_generators is not None:
            wish = replace(wish, num_generators=num_generators, scalings=before.scalings + 1)
        write_whole(self._asked, asdict(wish))

    def asked(self) -> Wish:
        """All that was asked since the run began."""
        try:
            return Wish(**json.loads(self._asked.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Wish()


@contextmanager
def told(name: str, folder: Path) -> Iterator[ControlFiles]:
    """A run of this process, from its beginning to how it ended."""
    files = ControlFiles(folder)
    files.open(name)
    note_folder(folder)
    make_known(name, folder)

    def tell_progress(bar: Bar) -> None:
        files.tell(progress=bar.counted(), eta_s=bar.eta_s)

    try:
        # Where nothing else renews the status, other hosts see by it that we live.
        with watched_by(tell_progress), repeated(files.tell, LIFE_SIGN_S, "signs of life"):
            yield files
    except Exception:
        files.tell(state="failed")
        raise
    except BaseException:
        files.tell(state="stopped")
        raise


def _status_in(written: dict[str, Any]) -> RunStatus:
    return RunStatus.from_json(written["status"])


def main(arguments: list[str] | None = None) -> None:
    """Ask and answer on the driver's node; prints one line of JSON, the last of its output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--generators", type=int)
    args = parser.parse_args(arguments)
    try:
        files = ControlFiles(folder_of_job(args.job))
        status = files.status()
        if args.stop or args.generators is not None:
            files.ask(stop=args.stop, num_generators=args.generators)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps({"status": asdict(status)}))


if __name__ == "__main__":
    main()
