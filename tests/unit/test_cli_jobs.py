"""Commands for runs of a cluster, as they are typed."""

import json
from pathlib import Path

import pytest
from job_client import FakeJobClient, details, work_folder
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.jobs import connection, run_handles
from rlhf_ray.jobs.job_server import JobServer

STATUS = {
    "name": "mine",
    "folder": "/mnt/mine",
    "stage": "ppo",
    "progress": "3/40 iterations",
    "generators": [{"name": "generator-0", "state": "ready", "version": 3, "restarts": 0}],
}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeJobClient:
    """A cluster with one run."""
    fake = FakeJobClient({"mine-1": details("mine-1")}, answer={"status": STATUS})
    server = JobServer(fake, sleep=lambda _: None)
    for module in (connection, run_handles):
        monkeypatch.setattr(module, "connect", lambda *_: server)
    return fake


def command(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_runs_are_listed_and_shown(client: FakeJobClient) -> None:
    assert "mine-1" in command("list")
    (job,) = json.loads(command("list", "--json"))
    assert (job["name"], job["folder"], job["status"]) == ("mine", "/mnt/mine", "RUNNING")
    at = ("--address", "http://head:8265")
    assert "3/40 iterations" in command("status", "mine", *at)
    found = json.loads(command("status", "/mnt/mine", *at, "--json"))
    assert found["generators"] == STATUS["generators"]
    assert command("logs", "mine-1", *at) == "log of mine-1\n"


def test_the_page_of_a_run_is_brought_from_its_drivers_node(client: FakeJobClient) -> None:
    at = ("--address", "http://head:8265")
    assert "8268 10.0.0.7 'rlhf-ray rank /mnt/mine@3 " in command("rank", "/mnt/mine@3", *at)
    text = command("rank", "/mnt/other", *at)
    assert "8268 head 'rlhf-ray rank /mnt/other " in text
    assert "The cluster has no run '/mnt/other'" in text


def test_a_page_comes_from_the_addresss_host_where_no_cluster_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # what the command sets is undone
    text = command("rank", "/mnt/mine", "--address", "http://127.0.0.1:9")
    assert "Nothing answers at http://127.0.0.1:9" in text
    assert "8268 HEAD 'rlhf-ray rank /mnt/mine " in text


def test_progress_bars_in_a_log_are_lines_and_escape_sequences_are_spelt_out(
    client: FakeJobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "get_job_logs", lambda _: "1%\r2%\r\n\x1b[2Jdone\n")
    assert command("logs", "mine-1") == "1%\n2%\n\\u001b[2Jdone\n"


def test_runs_are_scaled_and_stopped(client: FakeJobClient) -> None:
    at = ("--address", "http://head:8265")
    assert "Requested 3 generators" in command("scale", "mine", "--generators", "3", *at)
    assert "Stopped; run or submit it again" in command("stop", "mine", "--now", *at)
    assert client.asked == ["mine-1", "mine-1 --generators 3"]
    assert client.stopped == ["mine-1"]


def test_a_followed_run_gives_its_exit_code(client: FakeJobClient, tmp_path: Path) -> None:
    work = work_folder(tmp_path / "work")
    (work / "c.yaml").write_text("run: {name: new}\n")
    client.outcomes = [("FAILED", 3)]
    arguments = ["submit", str(work / "c.yaml"), f"run.dir={tmp_path / 'run'}", "--follow"]
    result = CliRunner().invoke(cli.app, [*arguments, "--working-dir", str(work)])
    assert result.exit_code == 3, result.output
    assert "Submitted new-" in result.output


def test_ctrl_c_while_watching_does_not_stop_the_run(
    client: FakeJobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: JobServer, job: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobServer, "follow", interrupted)
    assert "The run continues" in command("logs", "mine", "--follow", "--address", "http://head:1")
    assert client.stopped == []
