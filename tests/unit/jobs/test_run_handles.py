"""A run of this machine and a job of a cluster, by the same commands."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_client import FakeJobClient, details

from rlhf_ray.errors import ActorFailure, ConfigError
from rlhf_ray.jobs import connection, run_handles
from rlhf_ray.jobs.job_server import JobServer
from rlhf_ray.jobs.run_handles import JobRun, LocalRun, find_run
from rlhf_ray.runs import control
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.runs.status import Request
from rlhf_ray.types import GeneratorStatus

GENERATORS = (GeneratorStatus("generator-0", "ready", 3, 0),)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in connection.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


DRIVER = """
import socket, sys, time
from pathlib import Path
from rlhf_ray import interruption
from rlhf_ray.runs import control

folder, host, stage = sys.argv[1:]
socket.gethostname = lambda: host
control.LIFE_SIGN_S = 0.1
try:
    with interruption.handled(), control.reporting_status("mine", Path(folder)) as files:
        files.begin_stage(stage)
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(interruption.exit_code())
"""
HERE, ELSEWHERE = socket.gethostname(), "node-2"
on_any_host = pytest.mark.parametrize("host", [HERE, ELSEWHERE], ids=["here", "elsewhere"])
"""Where the driver is: on another host, which has the same folder, it cannot be looked up."""


@contextmanager
def driven(folder: Path, host: str, stage: str = "ppo") -> Iterator["subprocess.Popen[bytes]"]:
    """Have another process drive a run in a folder, as if it were on a host."""
    (folder / "config.yaml").write_text("{}\n")
    command = [sys.executable, "-c", DRIVER, str(folder), host, stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def job_run(told: dict[str, Any], **job: Any) -> tuple[FakeJobClient, JobRun]:
    answer = {"name": "mine", "folder": "/mnt/mine", "generators": [], **told}
    client = FakeJobClient({"mine-1": details("mine-1", **job)}, answer={"status": answer})
    server = JobServer(client, sleep=lambda _: None)
    return client, JobRun(server, server.find("mine"))


def test_a_run_of_this_machine_is_named_by_its_folder_or_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    ControlFiles(folder).open("mine")
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "runs/mine", "mine"):
        assert find_run(name, None).status().folder == str(folder)


def test_with_an_address_the_run_is_looked_up_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")
    client = FakeJobClient({"mine-1": details("mine-1")})
    asked = []

    def connect(address: str | None) -> JobServer:
        asked.append(address)
        return JobServer(client)

    monkeypatch.setattr(run_handles, "connect", connect)
    with pytest.raises(ConfigError, match="The cluster has no run"):
        find_run(str(tmp_path), "http://head:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert isinstance(find_run("mine", None), JobRun)
    assert asked == ["http://head:8265", None]


@on_any_host
def test_a_stop_waits_for_the_commit_or_ends_the_process(tmp_path: Path, host: str) -> None:
    said: list[str] = []
    run = LocalRun(tmp_path)
    with driven(tmp_path, host) as driver:
        run.stop(False, said.append)
        assert ControlFiles(tmp_path).requested() == Request(stop=True)
        assert driver.poll() is None
        run.stop(True, said.append)
        assert driver.wait(10) == 128 + signal.SIGTERM
    assert said[0].endswith("after the current iteration, committed and saved")
    assert said[1].endswith("PPO will resume from its last saved commit (ppo.save_every)")
    with pytest.raises(ConfigError, match="is not running but stopped"):
        run.stop(False, said.append)


@on_any_host
def test_a_supervised_stage_ends_at_once(tmp_path: Path, host: str) -> None:
    said: list[str] = []
    with driven(tmp_path, host, "sft") as driver:
        LocalRun(tmp_path).stop(False, said.append)
        assert ControlFiles(tmp_path).status().state == "stopped"
        assert driver.wait(10) == 128 + signal.SIGTERM
    assert said == [
        "Stopped in the stage sft; it will resume from that stage's last checkpoint, or repeat "
        "the stage if it has none"
    ]


@on_any_host
def test_a_driver_that_does_not_end_when_it_is_stopped_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(run_handles, "END_TIMEOUT_S", 0.0)
    with driven(tmp_path, host) as driver:
        named = rf"process {driver.pid} on {host}, has not ended within 0 s"
        with pytest.raises(ActorFailure, match=named):
            LocalRun(tmp_path).stop(True, print)


def test_a_driver_of_another_host_that_died_neither_runs_nor_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(control, "SILENT_S", 0.3)
    monkeypatch.setattr(control, "INTERVAL_S", 0.01)
    with driven(tmp_path, ELSEWHERE) as driver:
        driver.kill()
        driver.wait(10)
    run, said = LocalRun(tmp_path), list[str]()
    assert run.status().state == "running", "it has just reported"
    assert capsys.readouterr() == ("", "")
    for order in (lambda: run.stop(False, said.append), lambda: run.scale(3)):
        with pytest.raises(ConfigError, match="Run mine is not running but dead"):
            order()
    assert (said, ControlFiles(tmp_path).requested()) == ([], Request())
    capsys.readouterr()
    now = time.time() + 2 * control.LIFE_SIGN_S
    monkeypatch.setattr(time, "time", lambda: now)
    assert run.status().state == "dead"
    out, err = capsys.readouterr()
    assert out == "", "which programs read"
    assert "was left running by a driver on node-2: waiting up to 0.3 s" in err.replace("\n", " ")
    assert ControlFiles(tmp_path).status().state == "running", "a look changes no file"


def test_clocks_that_differ_make_no_run_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    with driven(tmp_path, ELSEWHERE):
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        assert LocalRun(tmp_path).status().state == "running"


def test_a_run_that_finishes_while_it_is_stopped_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, said = ControlFiles.request, list[str]()

    def ask_too_late(files: ControlFiles, *, stop: bool, now: bool) -> None:
        files.update(state="finished")
        ask(files, stop=stop, now=now)

    ControlFiles(tmp_path).open("mine")
    monkeypatch.setattr(ControlFiles, "request", ask_too_late)
    LocalRun(tmp_path).stop(True, said.append)
    assert said == ["The run has finished"]


def test_a_local_run_is_scaled_while_it_has_generators(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path)
    files.open("mine")
    files.update(stage="sft")
    with pytest.raises(ConfigError, match="has no generators now: it is in the stage sft"):
        LocalRun(tmp_path).scale(3)
    files.update(stage="ppo", generators=GENERATORS)
    LocalRun(tmp_path).scale(3)
    assert files.requested() == Request(num_generators=3, scalings=1)


def test_the_output_of_a_local_run_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a job of a cluster"):
        LocalRun(tmp_path).logs(follow=False)


def test_stopping_a_job_in_ppo_waits_for_its_commit() -> None:
    client, run = job_run({"stage": "ppo"})
    said: list[str] = []
    run.stop(False, said.append)
    assert client.asked == ["mine-1 --stop"]
    assert client.stopped == []
    assert said[-1] == "Job mine-1 succeeded; submit it again to resume"


@pytest.mark.parametrize(
    ("now", "stage", "job"),
    [
        (True, "ppo", {}),
        (False, "sft", {}),
        (False, None, {}),  # between its start and its first stage
        (False, "ppo", {"status": "PENDING"}),
    ],
)
def test_a_job_without_an_iteration_to_commit_is_stopped_at_once(
    now: bool, stage: str | None, job: dict[str, str]
) -> None:
    client, run = job_run({"stage": stage}, **job)
    said: list[str] = []
    run.stop(now, said.append)
    assert client.stopped == ["mine-1"]
    (text,) = said
    assert text.startswith("Stopped")


def test_a_job_is_scaled_by_its_driver() -> None:
    generators = [{"name": "generator-0", "state": "ready", "version": 3, "restarts": 0}]
    client, run = job_run({"stage": "ppo", "generators": generators})
    run.scale(3)
    assert client.asked == ["mine-1", "mine-1 --generators 3"]


def test_a_job_that_has_ended_is_not_queried() -> None:
    client, run = job_run({"stage": "ppo"}, status="FAILED")
    for order in (lambda: run.stop(False, print), lambda: run.scale(2)):
        with pytest.raises(ConfigError, match=r"mine-1 has ended already \(failed\)"):
            order()
    assert client.submitted == []


@pytest.mark.parametrize(("job", "state"), [("STOPPED", "stopped"), ("FAILED", "dead")])
def test_a_driver_that_was_stopped_with_force_is_not_called_dead(job: str, state: str) -> None:
    _, run = job_run({"stage": "ppo", "state": "dead"}, status=job)
    assert run.status().state == state


def ticking_run(client: FakeJobClient) -> JobRun:
    now = iter(range(10_000))
    server = JobServer(client, sleep=lambda _: None, clock=lambda: next(now))
    return JobRun(server, server.find("mine"))


def test_the_job_server_gives_the_status_of_an_ended_run_whose_node_is_gone() -> None:
    message = "x" * 20_000 + "\nIts node has died."
    ended = details("mine-1", status="FAILED", end_time=5_000, message=message)
    client = FakeJobClient({"mine-1": ended}, answers=False)
    found = ticking_run(client).status()
    assert (found.name, found.folder, found.state) == ("mine", "/mnt/mine", "failed")
    assert found.updated == 5.0
    assert found.message is not None
    assert found.message.endswith("Its node has died.")
    assert len(found.message) == run_handles.MESSAGE_CHARS


def test_the_job_server_gives_the_status_of_a_run_that_never_opened_its_folder() -> None:
    ended = details("mine-1", status="FAILED", message="exit code 2")
    client = FakeJobClient({"mine-1": ended}, answer={"error": "no folder (yet)"})
    assert ticking_run(client).status().message == "exit code 2"


def test_a_running_run_must_answer_unless_it_ends_meanwhile() -> None:
    client = FakeJobClient({"mine-1": details("mine-1")}, answers=False)
    run = ticking_run(client)
    with pytest.raises(ActorFailure, match="did not answer within 60 s"):
        run.status()
    client.jobs["mine-1"] = details("mine-1", status="STOPPED")
    assert run.status().state == "stopped"


def test_a_job_between_its_rehearsal_and_its_run_ends_at_once() -> None:
    client, run = job_run({"stage": "ppo", "state": "finished"})
    run.stop(False, print)
    assert client.stopped == ["mine-1"]
