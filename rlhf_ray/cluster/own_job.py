"""A run that is a Ray job: what its driver makes known of it, to others who know the job alone."""

import json
import os
from pathlib import Path

from rlhf_ray.cluster.orphans import records_folder, write_whole
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.progress import Progress

NAME, FOLDER = "rlhf_ray.run", "rlhf_ray.folder"
"""Metadata of a job: its run's name and folder."""

GCS_TIMEOUT_S = 10.0


def submission_id() -> str | None:
    """Of the Ray job whose entry point this process is."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")


def note_folder(folder: Path) -> None:
    """Note on this node which folder the job writes to: it is known by its id alone."""
    job = submission_id()
    if job is not None:
        for own in (records_folder(), _record(job).parent):
            own.mkdir(mode=0o700, exist_ok=True)
        write_whole(_record(job), {"folder": str(folder)})


def folder_of_job(job: str) -> Path:
    """The run's folder of a job whose driver is, or was, on this node.

    Raises:
        ConfigError: it has not come to that yet, or is no run of ours.
    """
    try:
        return Path(json.loads(_record(job).read_text(encoding="utf-8"))["folder"])
    except FileNotFoundError:
        raise ConfigError(
            f"Job {job} has opened no run folder (yet); see rlhf-ray logs {job}"
        ) from None


def _record(job: str) -> Path:
    return records_folder() / "jobs" / f"{job}.json"


def make_known(name: str, folder: Path) -> None:
    """Have the job server name the run of this process's job, where its submitter did not."""
    job = submission_id()
    if job is None:
        return
    try:
        _describe(job, {NAME: name, FOLDER: os.path.normpath(folder)})
    except Exception as error:  # of many kinds, and none is worth a run
        Progress().say(
            f"warning: the job server does not take this run's name and folder ({error}): where "
            f"its submitter has not named it, rlhf-ray list, status and stop know it as {job} alone"
        )


def _describe(job: str, run: dict[str, str]) -> None:
    """Fill in the job's record in Ray's own store, as the job's supervisor does with its status.

    Nothing else writes it while the driver runs, but the supervisor once the driver has ended.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    gcs = GcsClient(address=os.environ["RAY_ADDRESS"])  # which the supervisor sets
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
    info = json.loads(gcs.internal_kv_get(key, KV_NAMESPACE_JOB, timeout=GCS_TIMEOUT_S))
    metadata = info["metadata"] or {}
    if NAME not in metadata:
        told = json.dumps(info | {"metadata": metadata | run}).encode()
        gcs.internal_kv_put(key, told, True, KV_NAMESPACE_JOB, timeout=GCS_TIMEOUT_S)
