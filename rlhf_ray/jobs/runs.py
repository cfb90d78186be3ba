"""A run by its name, folder or submission id: a job of a cluster, or a run of this machine."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import psutil

from rlhf_ray.cluster.orphans import alive
from rlhf_ray.errors import ActorFailure, ConfigError
from rlhf_ray.jobs.server import Job, JobServer, configured_address, connect
from rlhf_ray.runs.control import ControlFiles, RunStatus, State

COMMITS = "ppo"
"""The stage that ends after its iteration when it is asked; others save by themselves."""

ENDED: dict[str, State] = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "stopped"}
"""State of a run by its job's status."""

MESSAGE_CHARS = 500
"""Of the job server's message, which may end with the log's last thousands."""

Say = Callable[[str], None]


class Run(Protocol):
    """What can be done with a run, wherever it is."""

    def status(self) -> RunStatus:
        """How it stands."""
        ...

    def stop(self, now: bool, say: Say) -> None:
        """End it: PPO after the iteration that it is in, committed; ``now``: without waiting."""
        ...

    def scale(self, num_generators: int) -> None:
        """Ask for another number of generators."""
        ...

    def logs(self, follow: bool) -> Iterator[str]:
        """What it has printed; ``follow``: until it ends."""
        ...


def find_run(run: str, address: str | None) -> Run:
    """The run of a name, folder or submission id.

    Where an address is given, here or in Ray's variables, runs are the cluster's; else a run of
    this machine comes first.

    Raises:
        ConfigError: there is none.
        PlacementError: the cluster cannot be reached.
    """
    if address is None and configured_address() is None:
        for folder in (Path(run), Path("runs") / run):
            if (folder / "config.yaml").is_file():
                return LocalRun(folder.absolute())
    server = connect(address)
    return JobRun(server, server.find(run))


class LocalRun:
    """A run in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ControlFiles(folder)

    def status(self) -> RunStatus:
        """As its driver wrote it."""
        return self._files.status()

    def stop(self, now: bool, say: Say) -> None:
        """See `Run`.

        Raises:
            ConfigError: it does not run, or runs on another machine.
        """
        status = self._files.status()
        require_running(status)
        if status.stage == COMMITS and not now:
            self._files.ask(stop=True)
            say("Asked; it ends after the iteration that it is in, committed and saved")
            return
        self._require_here()
        self._files.ask(stop=True)
        self._interrupt()
        say(ended_at_once(status))

    def _interrupt(self) -> None:
        process = alive(self._files.driver())
        if process is None:
            require_running(self._files.status())  # which tells how it has ended just now
            return
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)

    def _require_here(self) -> None:
        host = self._files.driver()["host"]
        if host != socket.gethostname():
            raise ConfigError(
                f"The driver of {self._folder} is not on this machine but on {host}; nothing was "
                "asked of it. Stop it there, or name the cluster with --address"
            )

    def scale(self, num_generators: int) -> None:
        """See `Run`.

        Raises:
            ConfigError: it does not run, or not PPO.
        """
        status = self._files.status()
        require_running(status)
        require_generators(status)
        self._files.ask(num_generators=num_generators)

    def logs(self, follow: bool) -> Iterator[str]:
        """Not kept for a run of this machine.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self._folder} is no job of a cluster: it prints where it was started, and nothing "
            "keeps that; metrics are in its stages' metrics.jsonl. Is --address missing?"
        )


class JobRun:
    """A run that is a job of a cluster."""

    def __init__(self, server: JobServer, job: Job) -> None:
        self._server = server
        self._job = job

    def status(self) -> RunStatus:
        """Read on its driver's node; where that is gone, as the job server knows it."""
        try:
            status = self._server.ask(self._job)
        except (ActorFailure, ConfigError):
            job = self._server.job(self._job.id)  # which may have ended in the meantime
            if not job.is_over:
                raise
            return status_of_ended(job)
        was_killed = status.state == "dead" and self._job.status == "STOPPED"
        return replace(status, state="stopped") if was_killed else status

    def stop(self, now: bool, say: Say) -> None:
        """See `Run`; waits for the end, unless ``now``.

        Raises:
            ConfigError: it has ended.
        """
        job = self._job
        self._require_going_on()
        status = None if now or job.status == "PENDING" else self._server.ask(job, "--stop")
        if status is None or status.stage != COMMITS or status.state != "running":
            self._server.stop(job)
            say(ended_at_once(status))
            return
        say("Asked; it ends after the iteration that it is in, committed and saved")
        ended = self._server.wait(job)
        say(f"Job {job.id} {ended.status.lower()}; submit it again to go on")

    def scale(self, num_generators: int) -> None:
        """See `Run`.

        Raises:
            ConfigError: it has ended, or is not in PPO.
        """
        self._require_going_on()
        require_generators(self._server.ask(self._job))
        self._server.ask(self._job, "--generators", str(num_generators))

    def _require_going_on(self) -> None:
        if self._job.is_over:
            raise ConfigError(f"Job {self._job.id} has ended already ({self._job.status.lower()})")

    def logs(self, follow: bool) -> Iterator[str]:
        """From its beginning."""
        return self._server.follow(self._job) if follow else iter([self._server.logs(self._job)])


def status_of_ended(job: Job) -> RunStatus:
    """What the job server knows of a run that has ended."""
    return RunStatus(
        name=job.name or job.id,
        folder=job.folder or "-",
        state=ENDED[job.status],
        updated=job.ended or job.started,
        message=job.message.strip()[-MESSAGE_CHARS:],
    )


def ended_at_once(status: RunStatus | None) -> str:
    """What a run that did not wait for a commit goes on from."""
    if status is None or status.stage is None:
        return "Ended at once; run or submit it again to go on"
    if status.stage == COMMITS:
        return "Ended at once; PPO goes on from its last saved commit (ppo.save_every)"
    return (
        f"Ended at once, in the stage {status.stage}; it goes on from that stage's last "
        "checkpoint, or does the stage again where it has none"
    )


def require_running(status: RunStatus) -> None:
    """Refuse to ask a driver that is gone."""
    if status.state != "running":
        raise ConfigError(f"Run {status.name} does not run: it is {status.state} ({status.folder})")


def require_generators(status: RunStatus) -> None:
    """Refuse to change the number of generators where there are none."""
    if not status.generators:
        raise ConfigError(
            f"Run {status.name} has no generators now: it is in the stage {status.stage}; they can "
            "be changed while PPO runs. generators.num says with how many it starts"
        )
