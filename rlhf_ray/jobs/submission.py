"""Submit a run to a cluster: pack the working folder, start the job, follow it."""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rlhf_ray.cluster.current_job import RUN_FOLDER, RUN_NAME
from rlhf_ray.config import Config, dump
from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs.job_server import Job, JobServer
from rlhf_ray.jobs.working_folder import pack
from rlhf_ray.runs.folder import require_durable_folder

CONFIG_FILE = "submitted.yaml"
"""The resolved config in the packed working folder, with parents and overrides merged in."""

ENTRYPOINT = f"exec rlhf-ray run {CONFIG_FILE}"


def require_for_a_cluster(config: Config) -> None:
    """Refuse a config that can run on one machine only, before a cluster is contacted."""
    require_durable_folder(config)
    if config.cluster.mode not in ("auto", "ray"):
        raise ConfigError(
            f"cluster.mode={config.cluster.mode} runs on one machine and cannot be submitted to a "
            "cluster; set cluster.mode=ray, or run it here with rlhf-ray run"
        )


def submit(config: Config, server: JobServer, folder: Path, *, rehearse: bool, retries: int) -> Job:
    """Start a run as a job and return the job.

    Args:
        config: the run's.
        server: of the cluster.
        folder: what travels with it.
        rehearse: whether PPO is rehearsed first.
        retries: how many times the job starts its driver again.

    Raises:
        ConfigError: the run is running there already, or the folder is too large.
    """
    _require_not_running(config, server)
    arguments = [*["--rehearse"] * rehearse, *[f"--retries {retries}"] * bool(retries)]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", config.run.name)
    submission_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    metadata = {RUN_NAME: config.run.name, RUN_FOLDER: os.path.normpath(config.run.dir)}
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "working_folder.zip"
        pack(folder, {CONFIG_FILE: dump(config)}, archive)
        server.submit(submission_id, " ".join([ENTRYPOINT, *arguments]), str(archive), metadata)
    return server.job(submission_id)


def follow(server: JobServer, job: Job, write: Callable[[str], None]) -> int:
    """Write what a submitted run prints until it ends; return its exit code, 1 if it has none."""
    for text in server.follow(job):
        write(text)
    return exit_code(server.job(job.id))


def exit_code(job: Job) -> int:
    """Return the exit code for a job that has ended."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.exit_code or 1
    return code if code > 0 else 128 - code  # negative: killed by that signal; shells say 128 + n


def _is_same(job: Job, config: Config) -> bool:
    return job.name == config.run.name or job.folder == os.path.normpath(config.run.dir)


def _require_not_running(config: Config, server: JobServer) -> None:
    for job in server.jobs():
        if not job.is_over and _is_same(job, config):
            raise ConfigError(
                f"Run {job.name} in {job.folder} is running already, as job {job.id}. Stop it "
                f"first (rlhf-ray stop {job.id}), or choose another run.name and run.dir"
            )
