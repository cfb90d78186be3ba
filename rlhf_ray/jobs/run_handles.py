"""Find a run by its name, folder or submission id, and show, stop or scale it.

It is a job of a cluster, behind the job server, or a run in a folder of this machine.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rlhf_ray.errors import ActorFailure, ConfigError, PlacementError
from rlhf_ray.jobs.connection import configured_address, connect
from rlhf_ray.jobs.job_server import POLL_S, Job, JobServer
from rlhf_ray.observability.progress import Progress
from rlhf_ray.runs.control import LIFE_SIGN_S, ControlFiles
from rlhf_ray.runs.status import RunStatus, State
from rlhf_ray.secrecy import redacted

COMMITS = "ppo"
"""The stage that commits its iteration before it stops; the others save by themselves."""

ENDED: dict[str, State] = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "stopped"}
"""Job status -> state of the run."""

END_TIMEOUT_S = 70.0
"""Longest time until a driver has ended that was requested to end now: it takes a second to see
that, and ends within a minute."""

MESSAGE_CHARS = 500
"""Most that is kept of the job server's message, which may contain the end of the log."""

STOPPING = "Stop requested: the run ends after the current iteration, committed and saved"

Say = Callable[[str], None]


class Run(Protocol):
    """A handle on a run, wherever it is; what the run cannot do now raises ConfigError."""

    def status(self) -> RunStatus:
        """Return its status."""
        ...

    def stop(self, now: bool, say: Say) -> None:
        """End it; PPO commits its current iteration first, unless ``now``."""
        ...

    def scale(self, num_generators: int) -> None:
        """Request another number of generators."""
        ...

    def logs(self, follow: bool) -> Iterator[str]:
        """Yield what it has printed; with ``follow`` until it ends."""
        ...


def find_run(run: str, address: str | None) -> Run:
    """Return the run with a name, folder or submission id.

    With an address, given here or in Ray's variables, only the cluster's runs count; else a run
    on this machine comes first.

    Raises:
        ConfigError: there is none.
        PlacementError: the cluster cannot be reached.
    """
    here = address is None and configured_address() is None
    if here:
        for folder in (Path(run), Path("runs") / run):
            if os.path.isfile(folder / "config.yaml"):
                return LocalRun(folder.absolute())
        if os.path.isdir(run):
            raise ConfigError(
                f"{run} is not the folder of a run: it has no config.yaml. Name a run.dir, or give "
                "the cluster with --address"
            )
    try:
        server = connect(address)
    except PlacementError as error:
        if here and os.sep in run:
            raise ConfigError(f"There is no folder {run} here. {error}") from error
        raise
    return JobRun(server, server.find(run))


def _say(text: str) -> None:
    """Print beside the output that programs read."""
    Progress(stream=sys.stderr).say(text)


class LocalRun:
    """A run in a folder of this machine, handled through its control files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ControlFiles(folder)

    def status(self) -> RunStatus:
        """Return what its driver wrote last, if it lives."""
        return self._files.observed_status(_say, trusted_s=LIFE_SIGN_S)

    def stop(self, now: bool, say: Say) -> None:
        """End the run: see `Run`; waits for the end, unless a commit comes first."""
        status = self._files.observed_status(_say)
        require_running(status)
        if status.stage == COMMITS and not now:
            self._files.request(stop=True)
            say(STOPPING)
            return
        self._files.request(stop=True, now=True)
        is_finished = self._end_state() == "finished"
        say("The run has finished" if is_finished else ended_at_once(status))

    def _end_state(self) -> State:
        """Wait for the driver's end; return how the run ended."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while (state := self._files.status().state) == "running":
            if time.monotonic() > deadline:
                driver = self._files.driver()
                raise ActorFailure(
                    f"The driver of {self._folder}, process {driver['pid']} on {driver['host']}, "
                    f"has not ended within {END_TIMEOUT_S:g} s; end it there, or its job"
                )
            time.sleep(POLL_S)
        return state

    def scale(self, num_generators: int) -> None:
        """Request another number of generators."""
        status = self._files.observed_status(_say)
        require_running(status)
        require_generators(status)
        self._files.request(num_generators=num_generators)

    def logs(self, follow: bool) -> Iterator[str]:
        """Refuse: the output of a run on this machine is not kept."""
        raise ConfigError(
            f"{self._folder} is a run on this machine, not a job of a cluster: its output went to "
            "the terminal that started it and is not kept; its metrics are in metrics.jsonl of "
            "each stage. For a job of a cluster give --address"
        )


class JobRun:
    """A run that is a job of a cluster."""

    def __init__(self, server: JobServer, job: Job) -> None:
        self._server = server
        self._job = job

    def status(self) -> RunStatus:
        """Query the driver's node; if that is gone and the run has ended, the job server."""
        try:
            status = self._server.query(self._job)
        except (ActorFailure, ConfigError):
            job = self._server.job(self._job.id)  # it may have ended in the meantime
            if not job.is_over:
                raise
            return status_of_ended(job)
        # A driver that the job server stops may be killed before it writes how it ended.
        was_killed = status.state == "dead" and self._job.status == "STOPPED"
        return replace(status, state="stopped") if was_killed else status

    def stop(self, now: bool, say: Say) -> None:
        """End the run: see `Run`; waits for the end, unless ``now``."""
        job = self._job
        self._require_not_over()
        status = None if now or job.status == "PENDING" else self._server.query(job, "--stop")
        if status is None or status.stage != COMMITS or status.state != "running":
            self._server.stop(job)
            say(ended_at_once(status))
            return
        say(STOPPING)
        ended = self._server.wait(job)
        say(f"Job {job.id} {ended.status.lower()}; submit it again to resume")

    def scale(self, num_generators: int) -> None:
        """Request another number of generators."""
        self._require_not_over()
        require_generators(self._server.query(self._job))
        self._server.query(self._job, "--generators", str(num_generators))

    def _require_not_over(self) -> None:
        if self._job.is_over:
            raise ConfigError(
                f"Job {self._job.id} has ended already ({self._job.status.lower()}); rlhf-ray logs "
                f"{self._job.id} shows what it printed, rlhf-ray submit starts it again"
            )

    def logs(self, follow: bool) -> Iterator[str]:
        """Yield what it has printed, from the beginning."""
        return self._server.follow(self._job) if follow else iter([self._server.logs(self._job)])


def status_of_ended(job: Job) -> RunStatus:
    """Return the status of a run that has ended, from the job server alone."""
    return RunStatus(
        name=job.name or job.id,
        folder=job.folder or "-",
        state=ENDED[job.status],
        updated=job.ended or job.started,
        message=redacted(job.message.strip())[-MESSAGE_CHARS:],
    )


def ended_at_once(status: RunStatus | None) -> str:
    """Say from where a run that did not wait for a commit will resume."""
    if status is None or status.stage is None:
        return "Stopped; run or submit it again to resume"
    if status.stage == COMMITS:
        return "Stopped; PPO will resume from its last saved commit (ppo.save_every)"
    return (
        f"Stopped in the stage {status.stage}; it will resume from that stage's last checkpoint, "
        "or repeat the stage if it has none"
    )


def require_running(status: RunStatus) -> None:
    """Refuse a request to a driver that is gone."""
    if status.state != "running":
        raise ConfigError(f"Run {status.name} is not running but {status.state} ({status.folder})")


def require_generators(status: RunStatus) -> None:
    """Refuse to change the number of generators if there are none."""
    if not status.generators:
        raise ConfigError(
            f"Run {status.name} has no generators now: it is in the stage {status.stage}. Their "
            "number can be changed while PPO runs; generators.num sets how many it starts with"
        )
