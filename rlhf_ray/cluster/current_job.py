"""The Ray job that this process is the entry point of, if any.

Other processes know a job by its id alone. So its driver records the run's folder on this node, and
adds the run's name and folder to the job's metadata in Ray's own store.
"""

import json
import os
from pathlib import Path
from urllib.parse import quote

from rlhf_ray.cluster.orphans import records_folder
from rlhf_ray.disk import is_private, make_private, write_atomically
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.progress import Progress

RUN_NAME, RUN_FOLDER = "rlhf_ray.run", "rlhf_ray.folder"
"""Keys in a job's metadata: its run's name and folder."""

GCS_TIMEOUT_S = 10.0


def submission_id() -> str | None:
    """Return the id of the job whose entry point this process is; None outside a job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return job.get("metadata", {}).get("job_submission_id")


def record_run_folder(folder: Path) -> None:
    """Record on this node which folder the current job writes to."""
    job = submission_id()
    if job is not None:
        # One by one: `mkdir(parents=True)` would not apply the mode to the parent.
        make_private(records_folder())
        make_private(_record(job).parent)
        write_atomically(_record(job), json.dumps({"folder": str(folder)}))


def run_folder_of_job(job: str) -> Path:
    """Return the run folder of a job whose driver is, or was, on this node.

    Raises:
        ConfigError: the job has not opened a folder yet, or is not a run.
    """
    path = _record(job)
    try:
        # What other users of the node may have put there doesn't count.
        if is_private(records_folder()) and is_private(path.parent):
            return Path(json.loads(path.read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # absent, or not a record
    raise ConfigError(
        f"Job {job} has opened no run folder (yet): it is still starting, or it failed before; "
        f"see rlhf-ray logs {job}"
    )


def _record(job: str) -> Path:
    return records_folder() / "jobs" / f"{quote(job, safe='')}.json"


def name_current_job(name: str, folder: Path) -> None:
    """Give the current job its run's name and folder, unless its submitter did."""
    job = submission_id()
    if job is None:
        return
    try:
        _describe(job, {RUN_NAME: name, RUN_FOLDER: os.path.normpath(folder)})
    except Exception as error:  # Ray raises many types here, and no run should fail for its name
        Progress().say(
            f"Warning: the job server did not accept this run's name and folder ({error}); unless "
            f"rlhf-ray submit started it, rlhf-ray list, status and stop know it as {job} only"
        )


def _describe(job: str, run: dict[str, str]) -> None:
    """Fill in the job's record in Ray's internal store, where its supervisor keeps the status.

    Ray's API can set metadata only when a job is submitted. The supervisor writes the record again
    only after the driver has ended, so the two never write at the same time.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    gcs = GcsClient(address=os.environ["RAY_ADDRESS"])  # set by the supervisor
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
    info = json.loads(gcs.internal_kv_get(key, KV_NAMESPACE_JOB, timeout=GCS_TIMEOUT_S))
    metadata = info["metadata"] or {}
    if RUN_NAME not in metadata:
        described = json.dumps(info | {"metadata": metadata | run}).encode()
        gcs.internal_kv_put(key, described, True, KV_NAMESPACE_JOB, timeout=GCS_TIMEOUT_S)
