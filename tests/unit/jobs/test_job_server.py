"""Runs on a job server: found by any of their names, asked, followed through lost connections."""

import socket
from typing import Any

import pytest
from job_client import FakeJobClient, details

from rlhf_ray.errors import ActorFailure, ConfigError, PlacementError
from rlhf_ray.jobs import job_server
from rlhf_ray.jobs.connection import ADDRESS_VARIABLES, connect
from rlhf_ray.jobs.job_server import JobServer

LOST = ConnectionError("the network is gone")


def server_of(client: FakeJobClient) -> JobServer:
    return JobServer(client, sleep=lambda _: None)


def test_a_run_is_found_by_its_name_its_folder_or_its_submission_id() -> None:
    server = server_of(FakeJobClient({"mine-1": details("mine-1")}))
    for name in ("mine", "/mnt/mine", "/mnt/mine/", "mine-1"):
        assert server.find(name).id == "mine-1"
    with pytest.raises(ConfigError, match=r"no run 'other' .* it has: mine\."):
        server.find("other")


def test_of_several_jobs_of_a_run_the_running_one_is_found_else_the_newest() -> None:
    old = details("old", start_time=1000, status="RUNNING")
    new = details("new", start_time=2000, status="FAILED")
    assert server_of(FakeJobClient({"old": old, "new": new})).find("mine").id == "old"
    old.status = "SUCCEEDED"
    assert server_of(FakeJobClient({"old": old, "new": new})).find("mine").id == "new"


def test_a_run_that_was_refused_as_its_name_is_in_use_does_not_hide_the_one_that_has_it() -> None:
    first, twin = details("first", start_time=1000), details("twin", start_time=2000)
    server = server_of(FakeJobClient({"first": first, "twin": twin}))
    assert server.find("mine").id == "first"
    twin.status, twin.end_time = "FAILED", 3000
    assert server.find("mine").id == "first"
    first.status, first.end_time = "SUCCEEDED", 4000
    assert server.find("mine").id == "first"


def test_other_jobs_are_not_runs_but_runs_of_rays_own_command_are() -> None:
    jobs = {
        "other": details("other", entrypoint="python train.py", metadata=None),
        "asking": details("asking", entrypoint=f"exec {job_server.CONTROL} rlhf-ray-1"),
        "driver": details(None),
        "plain": details("plain", entrypoint="rlhf-ray run c.yaml", metadata=None),
    }
    (job,) = server_of(FakeJobClient(jobs)).jobs()
    assert (job.id, job.name, job.folder) == ("plain", None, None)
    jobs["scripted"] = details("scripted", entrypoint="bash mine.sh")  # its driver named itself
    assert server_of(FakeJobClient(jobs)).find("mine").id == "scripted"


def test_a_driver_is_queried_on_its_own_node_by_a_job_that_is_deleted() -> None:
    status: dict[str, Any] = {"name": "mine", "folder": "/mnt/mine", "generators": []}
    client = FakeJobClient({"mine-1": details("mine-1")}, answer={"status": status})
    server = server_of(client)
    assert server.query(server.find("mine"), "--stop").folder == "/mnt/mine"
    assert client.asked == ["mine-1 --stop"]
    assert client.submitted[0]["entrypoint_label_selector"] == {"ray.io/node-id": "node-7"}
    assert "runtime_env" not in client.submitted[0]
    assert list(client.jobs) == ["mine-1"]


def test_what_the_node_refuses_is_reported() -> None:
    client = FakeJobClient({"mine-1": details("mine-1")}, answer={"error": "no folder (yet)"})
    server = server_of(client)
    with pytest.raises(ConfigError, match=r"no folder \(yet\)"):
        server.query(server.find("mine"))


def test_a_query_to_a_node_that_does_not_answer_times_out() -> None:
    client = FakeJobClient({"mine-1": details("mine-1")}, answers=False)
    now = iter(range(0, 1000, 10))
    server = JobServer(client, sleep=lambda _: None, clock=lambda: next(now))
    with pytest.raises(ActorFailure, match="did not answer within 60 s"):
        server.query(server.find("mine"))
    assert client.stopped == ["asking-1"]


def test_logs_continue_where_a_lost_connection_broke() -> None:
    attachments = {
        "mine-1": [["one\n", "two\n", LOST], [LOST], ["one\ntwo\nth"], ["one\ntwo\nthree\n"]]
    }
    client = FakeJobClient({"mine-1": details("mine-1")}, attachments=attachments)
    server = server_of(client)
    assert "".join(server.follow(server.find("mine"))) == "one\ntwo\nthree\n"


@pytest.mark.timeout(10)
def test_a_connection_cut_without_a_sign_is_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "SILENT_S", 0.005)
    hangs = None
    client = FakeJobClient(
        {"mine-1": details("mine-1")},
        attachments={"mine-1": [["one\n", hangs], [hangs], ["one\n", "tw", hangs], ["one\ntwo\n"]]},
    )
    pauses = list[float]()
    server = JobServer(client, sleep=pauses.append)
    assert list(server.follow(server.find("mine"))) == ["one\n", "tw", "o\n"]
    assert pauses == [], "the server answered all the time"


def test_what_a_run_printed_unseen_before_its_end_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "SILENT_S", 0.005)
    client = FakeJobClient(
        {"mine-1": details("mine-1", status="SUCCEEDED")},
        attachments={"mine-1": [["one\n", None], ["one\ntwo\n"]]},
    )
    server = server_of(client)
    assert "".join(server.follow(server.find("mine"))) == "one\ntwo\n"


def test_a_quiet_run_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "SILENT_S", 0.001)
    planned = [[LOST], *[[None]] * 20, [LOST], ["one\n"]]
    client = FakeJobClient({"mine-1": details("mine-1")}, attachments={"mine-1": planned})
    now = iter(range(0, 100_000, 400))  # so that two lost ones in a row are given up
    server = JobServer(client, sleep=lambda _: None, clock=lambda: next(now))
    assert "".join(server.follow(server.find("mine"))) == "one\n"


def test_a_quiet_connection_to_a_server_that_is_gone_is_a_lost_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_server, "SILENT_S", 0.001)
    client = FakeJobClient(
        {"mine-1": details("mine-1")}, attachments={"mine-1": [[None] for _ in range(20)]}
    )
    now = iter(range(0, 100_000, 400))
    server = JobServer(client, sleep=lambda _: None, clock=lambda: next(now))
    job = server.find("mine")

    def gone(job_id: str) -> Any:
        raise LOST

    monkeypatch.setattr(client, "get_job_info", gone)
    with pytest.raises(ActorFailure, match="Lost the job server for 600 s"):
        list(server.follow(job))


def test_a_server_that_stays_away_is_given_up() -> None:
    client = FakeJobClient(
        {"mine-1": details("mine-1")}, attachments={"mine-1": [[LOST] for _ in range(100)]}
    )
    now = iter(range(0, 100_000, 100))
    server = JobServer(client, sleep=lambda _: None, clock=lambda: next(now))
    with pytest.raises(ActorFailure, match=r"Lost the job server for 600 s: the network is gone"):
        list(server.follow(server.find("mine")))


def test_a_wrong_address_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        with pytest.raises(PlacementError, match=r"Nothing answers at http://127\.0\.0\.1:\d+"):
            connect(f"http://127.0.0.1:{taken.getsockname()[1]}")
