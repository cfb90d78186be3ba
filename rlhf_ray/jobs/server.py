"""The job server of a Ray cluster, by the dashboard's address alone: runs that are jobs there."""

import json
import logging
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from rlhf_ray.cluster.own_job import FOLDER, NAME
from rlhf_ray.errors import ActorFailure, ConfigError, PlacementError
from rlhf_ray.jobs import logs as job_logs
from rlhf_ray.runs.control import RunStatus

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

CONTROL = "python -m rlhf_ray.runs.control"
"""What the job that asks a driver runs; such jobs are no runs."""

ANSWERS = ('{"status": ', '{"error": ')
"""How the line that it prints begins."""

CONNECT_TIMEOUT_S = 10.0
ASK_TIMEOUT_S = 60.0
ASK_ENDED_TIMEOUT_S = 20.0
"""Of a run that has ended the server can say itself how, should its driver's node be gone."""
POLL_S = 0.2
REATTACH_WAITS_S = (1.0, 2.0, 5.0, 10.0)
"""Pauses before attaching again; the last one is repeated."""
LOST_AFTER_S = 600.0
"""How long the server may be away while a run is watched."""
LOST_CONNECTION = (RuntimeError, OSError, aiohttp.ClientError)
"""What Ray's client raises where it cannot get through."""


class JobClient(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        entrypoint_label_selector: dict[str, str] | None = None,
    ) -> str: ...
    def list_jobs(self) -> Sequence[Any]: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def delete_job(self, job_id: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A run as the job server knows it."""

    id: str
    """Submission id."""
    name: str | None
    """``run.name``; None until its driver has begun where Ray's own command submitted it."""
    folder: str | None
    """``run.dir``; None likewise."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: float
    """Unix seconds."""
    ended: float | None
    """Unix seconds; None while it goes on."""
    exit_code: int | None
    """Of its driver; None while it goes on, and where it was stopped."""
    message: str
    """The server's words on how it stands."""
    node: str | None
    """Id of the node that the driver is on."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """Runs on a cluster."""

    def __init__(
        self,
        client: JobClient,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._sleep = sleep
        self._clock = clock

    def submit(
        self, submission_id: str, entrypoint: str, archive: str, metadata: dict[str, str]
    ) -> None:
        """Start a job in a working folder that was packed."""
        self._call(
            self._client.submit_job,
            entrypoint=entrypoint,
            submission_id=submission_id,
            runtime_env={"working_dir": archive},
            metadata=metadata,
        )

    def jobs(self) -> list[Job]:
        """Every run, the newest first."""
        found = [
            _job(details) for details in self._call(self._client.list_jobs) if _is_run(details)
        ]
        return sorted(found, key=lambda job: -job.started)

    def job(self, submission_id: str) -> Job:
        """One job as it stands now."""
        return _job(self._call(self._client.get_job_info, submission_id))

    def find(self, run: str) -> Job:
        """The run of a name, folder or submission id.

        Of several the first that goes on, as a later one is refused by its driver; else the one
        that ended last.

        Raises:
            ConfigError: there is none.
        """
        jobs = self.jobs()
        asked = os.path.normpath(run)
        found = [job for job in jobs if run in (job.id, job.name) or asked == job.folder]
        if not found:
            known = ", ".join(dict.fromkeys(job.name or job.id for job in jobs)) or "none"
            raise ConfigError(
                f"The cluster has no run {run!r} (by name, folder or submission id); it has: "
                f"{known}. A run of this machine is named by its folder"
            )
        going_on = [job for job in found if not job.is_over]
        if going_on:
            return min(going_on, key=lambda job: job.started)
        return max(found, key=lambda job: (job.ended or 0.0, job.started))

    def ask(self, job: Job, *arguments: str) -> RunStatus:
        """Read the status of a run on its driver's node, and leave wishes (`control.main`).

        Raises:
            ConfigError: the run has not opened its folder.
            ActorFailure: the node does not answer.
        """
        entrypoint = f"exec {CONTROL} {shlex.join([job.id, *arguments])}"
        on_node = {"ray.io/node-id": job.node} if job.node else None
        asking = self._call(
            self._client.submit_job, entrypoint=entrypoint, entrypoint_label_selector=on_node
        )
        try:
            answer = self._answer(asking, ASK_ENDED_TIMEOUT_S if job.is_over else ASK_TIMEOUT_S)
        finally:
            with suppress(ActorFailure):  # where it has not ended
                self._call(self._client.delete_job, asking)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return RunStatus.from_json(answer["status"])

    def _answer(self, asking: str, timeout_s: float) -> dict[str, Any]:
        deadline = self._clock() + timeout_s
        while not (job := self.job(asking)).is_over:
            if self._clock() > deadline:
                self._call(self._client.stop_job, asking)
                raise ActorFailure(
                    f"The driver's node did not answer within {timeout_s:g} s; see the "
                    "cluster's dashboard for its state"
                )
            self._sleep(POLL_S)
        logs = self._call(self._client.get_job_logs, asking)
        if job.status != "SUCCEEDED":
            raise ActorFailure(f"The driver's node could not be asked: {logs.strip()[-500:]}")
        while (answer := _answer_in(logs)) is None:  # a log may come later than its job's end
            if self._clock() > deadline:
                raise ActorFailure(f"The driver's node gave no answer: {logs.strip()[-500:]}")
            self._sleep(POLL_S)
            logs = self._call(self._client.get_job_logs, asking)
        return answer

    def logs(self, job: Job) -> str:
        """All that a run has printed."""
        return self._call(self._client.get_job_logs, job.id)

    def follow(self, job: Job) -> Iterator[str]:
        """What a run prints until it ends; attaches again where the connection is lost.

        Raises:
            ActorFailure: the server was away for too long.
        """
        num_shown, tries, lost = 0, 0, None
        while True:
            try:
                for text in self._printed(job, skip=num_shown):
                    num_shown, tries, lost = num_shown + len(text), 0, None
                    if text:
                        yield text
                if self.job(job.id).is_over:
                    return
            except (*LOST_CONNECTION, ActorFailure) as error:
                lost = self._clock() if lost is None else lost
                if self._clock() - lost > LOST_AFTER_S:
                    raise ActorFailure(
                        f"Lost the job server for {LOST_AFTER_S:g} s: {error}. The run may go on: "
                        f"rlhf-ray logs {job.id} --follow"
                    ) from error
            self._sleep(REATTACH_WAITS_S[min(tries, len(REATTACH_WAITS_S) - 1)])
            tries += 1

    def _printed(self, job: Job, skip: int) -> Iterator[str]:
        """What a job prints, less the first ``skip`` characters, until the server ends the stream.

        Attaches again where nothing comes. An empty text says that the server lives.
        """
        while True:
            try:
                for text in job_logs.texts(self._client.tail_job_logs(job.id), skip):
                    skip += len(text)
                    yield text
                return
            except job_logs.Quiet:
                self.job(job.id)
                yield ""

    def wait(self, job: Job) -> Job:
        """Until a run has ended."""
        for _ in self.follow(job):
            pass
        return self.job(job.id)

    def stop(self, job: Job) -> None:
        """End a run at once: SIGTERM, three seconds later SIGKILL."""
        self._call(self._client.stop_job, job.id)

    def _call(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            return method(*args, **kwargs)
        except LOST_CONNECTION as error:
            raise ActorFailure(f"The job server does not answer: {error}") from error


def _answer_in(logs: str) -> dict[str, Any] | None:
    """The line that `control.main` prints; Ray and libraries may print others."""
    lines = [line for line in logs.splitlines() if line.startswith(ANSWERS)]
    return json.loads(lines[-1]) if lines else None


def connect(address: str | None) -> JobServer:
    """The job server at an address, else where Ray's variables say, else on this machine.

    Raises:
        PlacementError: nobody answers there, or does not know this user.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # which set their own level when they are imported
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    if address is not None:
        os.environ[ADDRESS_VARIABLES[0]] = address  # which Ray takes over its argument
    where = configured_address() or DEFAULT_ADDRESS
    _require_reachable(where)
    try:
        return JobServer(JobSubmissionClient(where))
    except AuthenticationError as error:
        raise PlacementError(
            f"{where} does not know this user: {str(error).splitlines()[0]}. Set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlacementError(f"Cannot use the job server at {where}: {error}") from error


def configured_address() -> str | None:
    """What Ray's variables say."""
    return next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)


def _require_reachable(where: str) -> None:
    """Fail soon where nobody listens: Ray's client would wait for minutes."""
    url = urlsplit(where)
    if url.scheme not in ("http", "https") or url.hostname is None:
        return  # the address of a cluster, which Ray turns into its dashboard's
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PlacementError(
            f"Nobody answers at {where}: {error}. Name the dashboard's address with --address or "
            f"{ADDRESS_VARIABLES[0]}, such as http://head-node:8265"
        ) from error


def _is_run(details: Any) -> bool:
    entrypoint = details.entrypoint or ""
    is_ours = NAME in (details.metadata or {}) or "rlhf-ray" in entrypoint
    return details.submission_id is not None and is_ours and CONTROL not in entrypoint


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    status = details.status
    return Job(
        id=details.submission_id,
        name=metadata.get(NAME),
        folder=metadata.get(FOLDER),
        status=getattr(status, "value", status),
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        node=details.driver_node_id,
    )
