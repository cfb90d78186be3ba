"""The status of a run and requests to its driver, through two small files in the run's folder.

    driver --> status.json --> rlhf-ray status, dashboards, other drivers
    driver <-- asked.json  <-- rlhf-ray stop, scale

Both are written whole, work with and without Ray, outlive the driver, and need no process of their
own. For a cluster, `jobs.job_server` runs this module on the driver's node, as a job of a second.
"""

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from rlhf_ray.cluster.current_job import name_current_job, record_run_folder, run_folder_of_job
from rlhf_ray.cluster.process_identity import living_process, same_process
from rlhf_ray.disk import locked, write_atomically
from rlhf_ray.errors import ConfigError
from rlhf_ray.interruption import cleaned_up_by
from rlhf_ray.observability.progress import Bar, Progress, watched_by
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.runs.status import Driver, Request, RunStatus, is_here, this_driver

INTERVAL_S = 1.0
"""Interval at which the driver looks for requests."""
LIFE_SIGN_S = 20.0
"""Longest time between two changes of the status while its driver lives."""
SILENT_S = 60.0
"""Time without a change after which the driver of another host counts as gone."""

_updating = threading.Lock()
"""Held to change the status: the loop and the heartbeat thread both write the file."""


class _Written(TypedDict):
    """The contents of status.json."""

    status: dict[str, Any]
    driver: Driver


_WRITTEN = TypeAdapter(_Written)
_REQUEST = TypeAdapter(Request)


class ControlFiles:
    """The status and request files of a run."""

    def __init__(self, folder: Path) -> None:
        self._status, self._requests = folder / "status.json", folder / "asked.json"
        self._lock = folder / "driver.lock"

    def open(self, name: str) -> None:
        """Begin a run of this process; drop the status and requests of earlier ones.

        Raises:
            ConfigError: another process runs here.
        """
        self.require_free()
        self._requests.unlink(missing_ok=True)
        self._write_status(RunStatus(name, str(self._status.parent)), this_driver())

    def require_free(self) -> None:
        """Refuse a folder that another process writes to.

        Raises:
            ConfigError: it runs, here or on another host.
        """
        try:
            driver, state = self.driver(), self.status().state
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            return  # not the folder of a run, or its status is damaged
        is_other = not same_process(driver, this_driver())
        if is_other and state == "running" and self._is_driven_by(driver):
            raise self._in_use()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process: two that start at once would both find no status.

        Raises:
            ConfigError: another process holds it.
        """
        with locked(self._lock) as is_ours:
            if not is_ours:
                raise self._in_use()
            yield

    def _in_use(self) -> ConfigError:
        folder, holder = self._status.parent, "a process that has just started"
        with suppress(ConfigError):
            if self.status().state == "running":
                holder = f"process {self.driver()['pid']} on {self.driver()['host']}"
        return ConfigError(
            f"{folder} is in use by {holder}. Stop that run first (rlhf-ray stop {folder}), or "
            "choose another run.dir"
        )

    def _is_driven_by(self, driver: Driver) -> bool:
        """Return whether the driver of a run whose state is "running" lives."""
        if is_here(driver):
            return True  # `status` has looked for the process
        if (status := self._changed_status(Progress().say)) is not None:
            return status.state == "running"
        self.update(state="dead")
        return False

    def _changed_status(self, say: Callable[[str], None]) -> RunStatus | None:
        """Return the status once it has changed; None if it does not in time.

        On another host only this proves that a driver lives: the age of the last change says
        nothing, because the hosts' clocks may differ.
        """
        say(
            f"{self._status.parent} was left running by a driver on {self.driver()['host']}: "
            f"waiting up to {SILENT_S:g} s for a sign of life"
        )
        before, deadline = None, time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            # Unreadable for a moment: replacing a file is not atomic on some network storage.
            with suppress(OSError, ValueError, ConfigError):
                status = self.status()
                if before is not None and status != before:
                    return status
                before = status
            time.sleep(INTERVAL_S)
        return None

    def observed_status(self, say: Callable[[str], None], trusted_s: float = 0.0) -> RunStatus:
        """Return the status; "dead" also if a driver that cannot be looked up shows no life.

        Args:
            say: prints what is waited for.
            trusted_s: a report of this age, by this host's clock, is taken for a sign of life.
        """
        status = self.status()
        is_fresh = abs(time.time() - status.updated) < trusted_s
        if status.state != "running" or is_here(self.driver()) or is_fresh:
            return status
        return self._changed_status(say) or replace(status, state="dead")

    def begin_stage(self, stage: str) -> None:
        """Begin a stage: reset what is known of the one before."""
        unknown = {f.name: f.default for f in fields(RunStatus) if f.default is not MISSING}
        self.update(**unknown | {"stage": stage})

    def update(self, **changes: object) -> None:
        """Change fields of the status. A missing or unwritable file does not end the run."""
        with suppress(OSError, ValueError, TypeError, KeyError, ConfigError), _updating:
            written = self._read()
            self._write_status(
                replace(RunStatus.from_json(written["status"]), **changes), written["driver"]
            )

    def _write_status(self, status: RunStatus, driver: Driver) -> None:
        values = asdict(replace(status, updated=time.time()))
        write_atomically(self._status, json.dumps({"status": values, "driver": driver}))

    def status(self) -> RunStatus:
        """Return the status; "dead" if its driver on this host is gone.

        Raises:
            ConfigError: no run has written here.
        """
        written = self._read()
        status, driver = RunStatus.from_json(written["status"]), written["driver"]
        if status.state == "running" and is_here(driver) and living_process(driver) is None:
            return replace(status, state="dead")
        return status

    def driver(self) -> Driver:
        """Return the process that drives the run."""
        return self._read()["driver"]

    def _read(self) -> _Written:
        try:
            return _WRITTEN.validate_json(self._status.read_bytes())
        except FileNotFoundError:
            raise ConfigError(
                f"{self._status.parent} holds no run that was started: it has no "
                f"{self._status.name}. For the runs of a cluster see rlhf-ray list"
            ) from None
        except (ValidationError, OSError) as error:
            is_read = isinstance(error, ValidationError)
            what = error.errors()[0]["msg"] if is_read else error.strerror
            raise ConfigError(
                f"{self._status} is damaged ({what}). A driver that lives writes it again within "
                f"{LIFE_SIGN_S:g} s; rlhf-ray report {self._status.parent} shows what the run has "
                "done, and the run can be resumed"
            ) from None

    def request(
        self, *, stop: bool = False, now: bool = False, num_generators: int | None = None
    ) -> None:
        """Leave a request for the driver, in addition to earlier ones."""
        before = self.requested()
        request = replace(before, stop=stop or before.stop, now=now or before.now)
        if num_generators is not None:
            request = replace(request, num_generators=num_generators, scalings=before.scalings + 1)
        write_atomically(self._requests, json.dumps(asdict(request)))

    def requested(self) -> Request:
        """Return everything requested since the run began."""
        try:
            return _REQUEST.validate_json(self._requests.read_bytes())
        except (OSError, ValidationError):  # none, or not one of ours: the next one replaces it
            return Request()


@contextmanager
def reporting_status(name: str, folder: Path) -> Iterator[ControlFiles]:
    """Keep the status of this process's run, from its beginning to how it ended."""
    with ControlFiles(folder).held():
        yield from _reported(name, folder)


def _reported(name: str, folder: Path) -> Iterator[ControlFiles]:
    files = ControlFiles(folder)
    files.open(name)
    record_run_folder(folder)
    name_current_job(name, folder)

    def report_progress(bar: Bar) -> None:
        files.update(progress=bar.counted(), eta_s=bar.eta_s)

    try:
        # An unchanged update is a sign of life for other hosts in long phases without progress.
        with (
            watched_by(report_progress),
            repeated(files.update, LIFE_SIGN_S, "signs of life"),
            repeated(_ending_on_request(files), INTERVAL_S, "requests to end"),
            cleaned_up_by(lambda: files.update(state="stopped")),
        ):
            yield files
    except Exception as error:
        files.update(state="failed", repeats=getattr(error, "repeats", False))
        raise
    except BaseException:
        files.update(state="stopped")
        raise


def _ending_on_request(files: ControlFiles) -> Callable[[], None]:
    """Return a call that ends this process, once, when it is requested to end now.

    A signal of its own: whoever requests it may be on another host.
    """
    asked = threading.Event()

    def end() -> None:
        if not asked.is_set() and files.requested().now:
            asked.set()
            os.kill(os.getpid(), signal.SIGTERM)

    return end


def main(arguments: list[str] | None = None) -> None:
    """Answer a query on the driver's node; prints one line of JSON, the last of its output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("--generators", type=int)
    args = parser.parse_args(arguments)
    try:
        files = ControlFiles(run_folder_of_job(args.job))
        answer = {"status": asdict(files.status())}
        if args.stop or args.generators is not None:
            files.request(stop=args.stop, num_generators=args.generators)
    except ConfigError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
