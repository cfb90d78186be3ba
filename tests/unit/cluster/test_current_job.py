"""Facts of a run that its job's driver publishes."""

import json
from pathlib import Path
from typing import Any

import pytest
from job_client import FakeJobClient, details
from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient, JobStatus

from rlhf_ray.cluster import current_job
from rlhf_ray.cluster.current_job import name_current_job
from rlhf_ray.jobs.job_server import JobServer

KEY = JobInfoStorageClient.JOB_DATA_KEY.format(job_id="plain").encode()


class Store:
    """Ray's own store, with the record of one job."""

    def __init__(self, info: JobInfo) -> None:
        self.records = {KEY: json.dumps(info.to_json()).encode()}
        self.num_puts = 0

    def internal_kv_get(self, key: bytes, namespace: bytes, timeout: float) -> bytes:
        assert namespace == b"job"
        return self.records[key]

    def internal_kv_put(
        self, key: bytes, value: bytes, overwrite: bool, namespace: bytes, timeout: float
    ) -> int:
        assert (namespace, overwrite) == (b"job", True)
        self.records[key] = value
        self.num_puts += 1
        return 0

    def info(self) -> Any:
        """The job as its server reads it."""
        return JobInfo.from_json(json.loads(self.records[KEY]))


def store_of(monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str] | None) -> Store:
    """The store of the job whose entry point this process is."""
    info = JobInfo(
        JobStatus.RUNNING,
        "rlhf-ray run mine.yaml",
        metadata=metadata,
        runtime_env={"working_dir": "gcs://x.zip"},
        driver_node_id="node-7",
    )
    store = Store(info)
    job = {"metadata": {"job_submission_id": "plain"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    def connect(address: str) -> Store:
        assert address == "10.0.0.1:6379"
        return store

    monkeypatch.setattr("ray._raylet.GcsClient", connect)
    return store


def test_a_job_of_rays_own_command_is_found_by_its_runs_name_and_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = store_of(monkeypatch, {"team": "a"})
    name_current_job("mine", Path("/mnt/other/../mine"))
    info = store.info()
    assert info.metadata["team"] == "a"
    assert (info.status, info.driver_node_id) == (JobStatus.RUNNING, "node-7")
    assert info.runtime_env == {"working_dir": "gcs://x.zip"}
    job = details("plain", entrypoint=info.entrypoint, metadata=info.metadata)
    server = JobServer(FakeJobClient({"plain": job}))
    for name in ("mine", "/mnt/mine", "plain"):
        assert server.find(name).id == "plain"


def test_a_job_without_metadata_gets_some(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(monkeypatch, None)
    name_current_job("mine", Path("/mnt/mine"))
    assert store.info().metadata == {"rlhf_ray.run": "mine", "rlhf_ray.folder": "/mnt/mine"}


def test_a_job_keeps_its_first_name(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(monkeypatch, {"rlhf_ray.run": "mine", "rlhf_ray.folder": "/mnt/mine"})
    name_current_job("mine-rehearsal", Path("/mnt/mine/rehearsal"))
    assert store.info().metadata["rlhf_ray.run"] == "mine"
    assert store.num_puts == 0


def test_a_run_continues_if_the_job_server_refuses_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(monkeypatch, None)
    store.records.clear()
    name_current_job("mine", Path("/mnt/mine"))
    assert "list, status and stop know it as plain only" in capsys.readouterr().out


def test_outside_a_job_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr(current_job, "_describe", lambda *_: pytest.fail("a store was asked"))
    name_current_job("mine", Path("/mnt/mine"))
