"""Runs on their way to a cluster: what is sent, what is refused, what is tried again."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from job_client import FakeJobClient, details, work_folder
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import Config
from rlhf_ray.config.load import load, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs import connection
from rlhf_ray.jobs.job_server import JobServer
from rlhf_ray.jobs.submission import exit_code, follow, submit


def config_of(**run: Any) -> Config:
    return resolve({"run": {"name": "mine", "dir": "/mnt/mine", **run}})


def server_of(client: FakeJobClient) -> JobServer:
    return JobServer(client, sleep=lambda _: None)


def followed(client: FakeJobClient, folder: Path) -> tuple[int, str]:
    server, written = server_of(client), list[str]()
    job = submit(config_of(), server, folder, rehearse=False, retries=0)
    return follow(server, job, written.append), "".join(written)


def test_a_run_is_sent_with_its_folder_and_its_config_as_it_was_resolved(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text("ppo: {gamma: 0.5}\n")
    child.write_text("extends: parent.yaml\nrun: {name: mine, dir: /mnt/mine}\n")
    config = load(child, ["ppo.epochs=3"])
    client = FakeJobClient()
    job = submit(
        config, server_of(client), work_folder(tmp_path / "work"), rehearse=False, retries=0
    )
    (sent,) = client.submitted
    assert sent["entrypoint"] == "exec rlhf-ray run submitted.yaml"
    assert sent["metadata"] == {"rlhf_ray.run": "mine", "rlhf_ray.folder": "/mnt/mine"}
    assert set(sent["runtime_env"]) == {"working_dir"}
    assert job.id.startswith("mine-")
    (files,) = client.packed
    assert files["rewards.py"] == "def mine(): ...\n"
    assert resolve(yaml.safe_load(files["submitted.yaml"])) == config


def test_no_secret_of_this_machine_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "planted-5ecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
    folder = work_folder(tmp_path / "work")
    for name in (".env", ".netrc", "cluster.key"):
        (folder / name).write_text(secret)
    client = FakeJobClient()
    submit(config_of(), server_of(client), folder, rehearse=False, retries=0)
    assert secret not in repr(client.submitted) + repr(client.packed)
    assert len(client.packed[0]) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": {"name": "mine"}}, r"run\.dir runs/mine is relative.*/mnt/shared/runs/mine"),
        (
            {"run": {"dir": "/mnt/mine"}, "cluster": {"mode": "local"}},
            r"cluster\.mode=local runs on one machine",
        ),
    ],
)
def test_a_config_for_one_machine_is_refused_before_a_cluster_is_contacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(connection, "connect", lambda _: pytest.fail("a cluster was contacted"))
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["submit", str(tmp_path / "config.yaml")], catch_exceptions=False)


@pytest.mark.parametrize("run", [{}, {"name": "other"}, {"dir": "/mnt/other"}])
def test_a_run_that_is_running_is_not_submitted_again(tmp_path: Path, run: dict[str, str]) -> None:
    client = FakeJobClient({"mine-1": details("mine-1")})
    folder = work_folder(tmp_path / "work")
    with pytest.raises(ConfigError, match=r"is running already, as job mine-1\. Stop it first"):
        submit(config_of(**run), server_of(client), folder, rehearse=False, retries=0)
    client.jobs["mine-1"].status = "FAILED"
    submit(config_of(**run), server_of(client), folder, rehearse=False, retries=0)


def test_the_job_itself_carries_its_retries_and_its_rehearsal(tmp_path: Path) -> None:
    client = FakeJobClient()
    folder = work_folder(tmp_path / "work")
    submit(config_of(), server_of(client), folder, rehearse=True, retries=3)
    (sent,) = client.submitted
    assert sent["entrypoint"] == "exec rlhf-ray run submitted.yaml --rehearse --retries 3"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(("SUCCEEDED", 0), 0), (("FAILED", 2), 2), (("FAILED", -9), 137), (("STOPPED", None), 1)],
)
def test_who_follows_a_run_gets_the_exit_code_of_its_driver(
    tmp_path: Path, outcome: tuple[str, int | None], code: int
) -> None:
    client = FakeJobClient(outcomes=[outcome])
    found, _ = followed(client, work_folder(tmp_path / "work"))
    assert (found, len(client.submitted)) == (code, 1)


def test_a_driver_that_was_killed_has_the_exit_code_that_shells_give() -> None:
    killed = details("mine-1", status="FAILED", driver_exit_code=-9)
    assert exit_code(server_of(FakeJobClient({"mine-1": killed})).job("mine-1")) == 137
