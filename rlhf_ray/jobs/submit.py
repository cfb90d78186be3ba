"""Sends a run to a cluster: packs the working folder, submits, follows, tries again."""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rlhf_ray.cluster.own_job import FOLDER, NAME
from rlhf_ray.cluster.session import require_durable_folder
from rlhf_ray.config import Config, dump
from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs.server import Job, JobServer
from rlhf_ray.jobs.working_folder import pack

CONFIG_FILE = "submitted.yaml"
"""The resolved config in the packed working folder: parents and overrides are in it."""

ENTRYPOINT = f"exec rlhf-ray run {CONFIG_FILE}"
RESUME = "run.resume=auto"
REHEARSE = "--rehearse"

USER_ERROR = 2
"""Exit code of a run that its user must mend: to try again would change nothing."""


def require_for_a_cluster(config: Config) -> None:
    """Refuse what can run on one machine alone, before any cluster is asked.

    Raises:
        ConfigError: with what to change.
    """
    require_durable_folder(config)
    if config.cluster.mode not in ("auto", "ray"):
        raise ConfigError(
            f"cluster.mode {config.cluster.mode} runs on one machine by itself and cannot be "
            "submitted; set cluster.mode=ray, or use rlhf-ray run"
        )


def submit(config: Config, server: JobServer, folder: Path, *, rehearse: bool) -> Job:
    """Start a run as a job; returns it.

    Args:
        config: carried as it was resolved here; `require_for_a_cluster` has passed it.
        server: of the cluster.
        folder: working folder of the run, to which relative paths in the config refer.
        rehearse: whether PPO is rehearsed first, where it was not.

    Raises:
        ConfigError: the run goes on there already, or the folder is too large.
    """
    _require_not_running(config, server)
    return _send(config, server, folder, [REHEARSE] * rehearse)


def follow(
    config: Config,
    server: JobServer,
    folder: Path,
    job: Job,
    write: Callable[[str], None],
    num_retries: int,
    *,
    rehearse: bool,
) -> int:
    """Write what a submitted run prints to its end; where it failed, submit it again to go on.

    Args:
        config: as it was submitted, like ``server`` and ``folder``.
        job: from `submit`.
        write: takes text as it comes, line ends included.
        num_retries: how often to submit again.
        rehearse: as it was submitted.

    Returns:
        The exit code of the last job's driver; 1 where it has none.
    """
    while True:
        for text in server.follow(job):
            write(text)
        job = server.job(job.id)
        if job.status != "FAILED" or job.exit_code == USER_ERROR or num_retries == 0:
            return exit_code(job)
        num_retries -= 1
        job = _send(config, server, folder, [RESUME, *[REHEARSE] * rehearse])
        write(f"The run failed and goes on as {job.id} ({num_retries} retries left)\n")


def exit_code(job: Job) -> int:
    """Of a job that has ended."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.exit_code or 1
    return code if code > 0 else 128 - code  # ended by a signal, as shells tell it


def _send(config: Config, server: JobServer, folder: Path, arguments: list[str]) -> Job:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", config.run.name)
    submission_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    metadata = {NAME: config.run.name, FOLDER: os.path.normpath(config.run.dir)}
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "working_folder.zip"
        pack(folder, {CONFIG_FILE: dump(config)}, archive)
        entrypoint = " ".join([ENTRYPOINT, *arguments])
        server.submit(submission_id, entrypoint, str(archive), metadata)
    return server.job(submission_id)


def _is_same(job: Job, config: Config) -> bool:
    return job.name == config.run.name or job.folder == os.path.normpath(config.run.dir)


def _require_not_running(config: Config, server: JobServer) -> None:
    for job in server.jobs():
        if not job.is_over and _is_same(job, config):
            raise ConfigError(
                f"Run {job.name} in {job.folder} goes on already, as job {job.id}: stop it first "
                f"(rlhf-ray stop {job.id}), or choose another run.name and run.dir"
            )
