"""The job server of a Ray cluster: the runs that are jobs there, their status and their logs."""

import asyncio
import json
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from rlhf_ray.cluster.current_job import RUN_FOLDER, RUN_NAME
from rlhf_ray.errors import ActorFailure, ConfigError
from rlhf_ray.runs.status import RunStatus

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

P = ParamSpec("P")
T = TypeVar("T")

CONTROL = "python -m rlhf_ray.runs.control"
"""Entry point of the short jobs that query a driver; they are not runs."""

ANSWERS = ('{"status": ', '{"error": ')
"""How the line with the answer of such a job begins."""

QUERY_TIMEOUT_S = 60.0
QUERY_ENDED_TIMEOUT_S = 20.0
"""Shorter for a run that has ended: if its driver's node is gone, the job server knows how."""
POLL_S = 0.2
SILENT_S = 60.0
"""After this long without text a connection may be dead."""
REATTACH_WAITS_S = (1.0, 2.0, 5.0, 10.0)
"""Pauses before attaching again; the last one is repeated."""
LOST_AFTER_S = 600.0
"""How long the job server may be unreachable while a run is followed."""
LOST_CONNECTION = (RuntimeError, OSError, aiohttp.ClientError)
"""What Ray's client raises when it cannot get through."""


class JobClient(Protocol):
    """The part of `ray.job_submission.JobSubmissionClient` that is used here."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
        entrypoint_label_selector: dict[str, str] | None = None,
    ) -> str: ...
    def list_jobs(self) -> "Sequence[JobDetails]": ...
    def get_job_info(self, job_id: str) -> "JobDetails": ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def delete_job(self, job_id: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A run as the job server describes it; printed by ``list --json``."""

    id: str
    """Submission id."""
    name: str | None
    """``run.name``; None until the driver has started, if Ray's own command submitted it."""
    folder: str | None
    """``run.dir``; None likewise."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: float
    """Unix seconds."""
    ended: float | None
    """Unix seconds; None while it runs."""
    exit_code: int | None
    """The driver's; None while it runs, and where it was stopped."""
    message: str
    """The server's words on the status."""
    node: str | None
    """Id of the node that the driver is on."""
    host: str | None = None
    """Address of that node."""

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The runs on a cluster, through the client of its job server."""

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
        """Start a job in the working folder packed in ``archive``."""
        self._call(
            self._client.submit_job,
            entrypoint=entrypoint,
            submission_id=submission_id,
            runtime_env={"working_dir": archive},
            metadata=metadata,
        )

    def jobs(self) -> list[Job]:
        """Return every run, the newest first."""
        runs = [_job(details) for details in self._call(self._client.list_jobs) if _is_run(details)]
        return sorted(runs, key=lambda job: -job.started)

    def job(self, submission_id: str) -> Job:
        """Return one job as it is now."""
        return _job(self._call(self._client.get_job_info, submission_id))

    def find(self, run: str) -> Job:
        """Return the run with a name, folder or submission id.

        Of several the one that started first and still runs, because the driver of a later one
        refuses to start; else the one that ended last.

        Raises:
            ConfigError: there is none.
        """
        jobs = self.jobs()
        folder = os.path.normpath(run)
        matching = [job for job in jobs if run in (job.id, job.name) or folder == job.folder]
        if not matching:
            known = ", ".join(dict.fromkeys(job.name or job.id for job in jobs)) or "none"
            raise ConfigError(
                f"The cluster has no run {run!r} (by name, folder or submission id); it has: "
                f"{known}. For a run on this machine give its folder"
            )
        running = [job for job in matching if not job.is_over]
        if running:
            return min(running, key=lambda job: job.started)
        return max(matching, key=lambda job: (job.ended or 0.0, job.started))

    def query(self, job: Job, *arguments: str) -> RunStatus:
        """Read a run's status on its driver's node, and leave requests there (`control.main`).

        The status lies in the run's folder, which only that node may see; so a job of a second
        runs there.

        Raises:
            ConfigError: the run has not opened its folder.
            ActorFailure: the node does not answer.
        """
        entrypoint = f"exec {CONTROL} {shlex.join([job.id, *arguments])}"
        on_node = {"ray.io/node-id": job.node} if job.node else None
        query = self._call(
            self._client.submit_job, entrypoint=entrypoint, entrypoint_label_selector=on_node
        )
        try:
            answer = self._answer(query, QUERY_ENDED_TIMEOUT_S if job.is_over else QUERY_TIMEOUT_S)
        finally:
            with suppress(ActorFailure):  # a job that has not ended cannot be deleted
                self._call(self._client.delete_job, query)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return RunStatus.from_json(answer["status"])

    def _answer(self, query: str, timeout_s: float) -> dict[str, Any]:
        deadline = self._clock() + timeout_s
        while not (job := self.job(query)).is_over:
            if self._clock() > deadline:
                self._call(self._client.stop_job, query)
                raise ActorFailure(
                    f"The driver's node did not answer within {timeout_s:g} s; look at the "
                    "cluster's dashboard whether the node is alive and has a free CPU"
                )
            self._sleep(POLL_S)
        logs = self._call(self._client.get_job_logs, query)
        if job.status != "SUCCEEDED":
            raise ActorFailure(f"The query on the driver's node failed: {logs.strip()[-500:]}")
        while (answer := _answer_in(logs)) is None:  # the log may arrive after the job's end
            if self._clock() > deadline:
                raise ActorFailure(
                    f"The driver's node sent no answer within {timeout_s:g} s, only: "
                    f"{logs.strip()[-500:]}"
                )
            self._sleep(POLL_S)
            logs = self._call(self._client.get_job_logs, query)
        return answer

    def logs(self, job: Job) -> str:
        """Return everything that a run has printed."""
        return self._call(self._client.get_job_logs, job.id)

    def follow(self, job: Job) -> Iterator[str]:
        """Yield what a run prints until it ends; attach again when the connection is lost.

        Raises:
            ActorFailure: the server was unreachable for `LOST_AFTER_S`.
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
                        f"Lost the job server for {LOST_AFTER_S:g} s: {error}. The run may still "
                        f"be running; follow it with rlhf-ray logs {job.id} --follow"
                    ) from error
            self._sleep(REATTACH_WAITS_S[min(tries, len(REATTACH_WAITS_S) - 1)])
            tries += 1

    def _printed(self, job: Job, skip: int) -> Iterator[str]:
        """Yield what a job prints after its first ``skip`` characters, until the stream ends.

        Attaches again after a silence. An empty text means that the server has answered.
        """
        while True:
            try:
                for text in _texts(self._client.tail_job_logs(job.id), skip):
                    skip += len(text)
                    yield text
                return
            except _Silence:
                self.job(job.id)
                yield ""

    def wait(self, job: Job) -> Job:
        """Wait until a run has ended."""
        for _ in self.follow(job):
            pass
        return self.job(job.id)

    def stop(self, job: Job) -> None:
        """End a run at once: SIGTERM, three seconds later SIGKILL."""
        self._call(self._client.stop_job, job.id)

    def _call(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except LOST_CONNECTION as error:
            raise ActorFailure(f"The job server does not answer: {error}") from error


class _Silence(Exception):
    """Nothing came for `SILENT_S`: the run prints nothing, or the connection was cut without a
    sign, for example because this machine slept."""


def _texts(stream: AsyncIterator[str], skip: int) -> Iterator[str]:
    """Yield one connection's text after its first ``skip`` characters, until the server ends it."""
    with asyncio.Runner() as runner:
        while (text := runner.run(_next(stream))) is not None:
            rest, skip = text[skip:], max(0, skip - len(text))
            if rest:
                yield rest


async def _next(stream: AsyncIterator[str]) -> str | None:
    deadline = asyncio.timeout(SILENT_S)
    try:
        async with deadline:
            return await anext(stream, None)
    except TimeoutError as error:
        if deadline.expired():
            raise _Silence from error
        raise  # the connection's own timeout


def _answer_in(logs: str) -> dict[str, Any] | None:
    """Return what `control.main` printed; Ray and libraries may print other lines."""
    lines = [line for line in logs.splitlines() if line.startswith(ANSWERS)]
    return json.loads(lines[-1]) if lines else None


def _is_run(details: "JobDetails") -> bool:
    # A run that Ray's own command submitted has no metadata until its driver has started.
    entrypoint = details.entrypoint or ""
    is_ours = RUN_NAME in (details.metadata or {}) or "rlhf-ray" in entrypoint
    return details.submission_id is not None and is_ours and CONTROL not in entrypoint


def _job(details: "JobDetails") -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        name=metadata.get(RUN_NAME),
        folder=metadata.get(RUN_FOLDER),
        status=str(getattr(details.status, "value", details.status)),
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        node=details.driver_node_id,
        host=urlsplit(details.driver_agent_http_address or "").hostname,
    )
