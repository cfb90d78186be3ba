"""Status and requests in the files of a run's folder."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from rlhf_ray.cluster import current_job
from rlhf_ray.cluster.process_identity import identity
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.runs import control
from rlhf_ray.runs.control import ControlFiles, reporting_status
from rlhf_ray.runs.status import Request, RunStatus
from rlhf_ray.types import GeneratorStatus


@pytest.fixture
def as_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make this process the entry point of a job."""
    monkeypatch.setattr(current_job, "records_folder", lambda: tmp_path / "records")
    monkeypatch.setattr(control, "name_current_job", lambda *_: None)
    metadata = {"metadata": {"job_submission_id": "job-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    return "job-1"


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    control.main(list(arguments))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_others_read_the_status_that_the_driver_wrote(tmp_path: Path) -> None:
    generators = (GeneratorStatus("generator-0", "ready", 7, 1),)
    with reporting_status("mine", tmp_path) as files:
        files.update(stage="ppo", iteration=7, reward=0.5, generators=generators)
        found = ControlFiles(tmp_path).status()
    assert (found.name, found.folder, found.state) == ("mine", str(tmp_path), "running")
    assert (found.stage, found.iteration, found.reward) == ("ppo", 7, 0.5)
    assert found.generators == generators
    assert RunStatus.from_json(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError, "failed"), (KeyboardInterrupt, "stopped"), (SystemExit, "stopped")],
)
def test_a_status_says_how_it_ended(tmp_path: Path, error: type[BaseException], state: str) -> None:
    with pytest.raises(error), reporting_status("mine", tmp_path):
        raise error
    assert ControlFiles(tmp_path).status().state == state


def test_progress_is_in_the_status_until_the_next_stage_begins(tmp_path: Path) -> None:
    now = 0.0
    with reporting_status("mine", tmp_path) as files:
        files.begin_stage("sft")
        with Progress(stream=io.StringIO(), clock=lambda: now).stage("sft", 150) as bar:
            assert files.status().progress == "0/150 steps"
            now = 5.0
            bar.advance(10)
            now = 25.0
            bar.advance(40)
            found = files.status()
        assert (found.stage, found.progress) == ("sft", "50/150 steps")
        assert found.eta_s == 50.0  # 100 steps at half a second, the first 10 apart
        files.update(iteration=3)
        files.begin_stage("evaluate")
        found = files.status()
    assert (found.stage, found.progress, found.iteration) == ("evaluate", None, None)
    with Progress(stream=io.StringIO()).stage("other", 1) as bar:
        bar.advance(1)
    assert files.status().progress is None, "what comes after the run is not the run's"


def test_a_driver_that_vanished_without_reporting_is_dead(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from rlhf_ray.runs.control import ControlFiles\n"
        "ControlFiles(Path(sys.argv[1])).open('mine'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert ControlFiles(tmp_path).status().state == "dead"


def test_requests_add_up_and_are_dropped_when_a_run_begins(tmp_path: Path) -> None:
    files = ControlFiles(tmp_path)
    files.open("mine")
    assert files.requested() == Request()
    files.request(num_generators=3)
    files.request(stop=True)
    assert files.requested() == Request(stop=True, num_generators=3, scalings=1)
    files.request(num_generators=2)
    assert files.requested() == Request(stop=True, num_generators=2, scalings=2)
    files.open("mine")
    assert files.requested() == Request()


def test_a_status_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ControlFiles(tmp_path)
    files.open("mine")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    files.update(iteration=1)
    assert files.status().iteration is None
    (tmp_path / "status.json").unlink()
    files.update(iteration=1)


def test_a_job_is_queried_by_its_id_alone(
    tmp_path: Path, as_job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert "has opened no run folder (yet)" in asked(capsys, as_job)["error"]
    with reporting_status("mine", run) as files:
        answer = asked(capsys, as_job)
        assert answer["status"]["folder"] == str(run)
        assert files.requested() == Request()
        asked(capsys, as_job, "--stop", "--generators", "4")
        assert files.requested() == Request(stop=True, num_generators=4, scalings=1)


def test_a_folder_without_a_run_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run that was started"):
        ControlFiles(tmp_path).status()


def test_a_folder_in_which_another_process_runs_is_not_taken(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with reporting_status("mine", tmp_path):
            written = json.loads((tmp_path / "status.json").read_text())
            written["driver"] = identity(psutil.Process(other.pid)) | {
                "host": written["driver"]["host"]
            }
            (tmp_path / "status.json").write_text(json.dumps(written))
            with (
                pytest.raises(ConfigError, match=f"in use by process {other.pid}"),
                reporting_status("mine", tmp_path),
            ):
                pass
        other.kill()


HOLDS = """
import sys, subprocess
from pathlib import Path
from rlhf_ray.runs.control import ControlFiles

with ControlFiles(Path(sys.argv[1])).held():
    # A child that outlives it must not keep the folder.
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(child.pid, flush=True)
    input()
"""


def test_of_two_drivers_that_start_at_once_one_is_refused_until_the_other_dies(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        child = psutil.Process(int(other.stdout.readline()))
        # It has written no status yet.
        refused = pytest.raises(ConfigError, match="in use by a process that has just started")
        with refused, reporting_status("mine", tmp_path):
            pass
        assert not (tmp_path / "status.json").exists()
        ControlFiles(tmp_path).open("mine")
        _drive(tmp_path, dict(identity(psutil.Process(other.pid))))
        named = pytest.raises(ConfigError, match=f"in use by process {other.pid} on")
        with named, ControlFiles(tmp_path).held():
            pass
        other.kill()
    with reporting_status("mine", tmp_path):
        assert child.is_running()
    child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="where the start counts from the boot")
def test_a_step_of_the_clock_leaves_a_run_running_and_its_folder_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with reporting_status("mine", tmp_path) as files:
            _drive(tmp_path, dict(identity(psutil.Process(other.pid))))
            boot_time = psutil._pslinux.boot_time()  # type: ignore[attr-defined]
            monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time - 1)  # type: ignore[attr-defined]
            assert files.status().state == "running"
            with pytest.raises(ConfigError, match="in use by process"):
                ControlFiles(tmp_path).open("mine")
        other.kill()


def test_a_folder_of_another_container_with_the_same_id_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "INTERVAL_S", 0.001)
    monkeypatch.setattr(control, "SILENT_S", 10.0)
    files = ControlFiles(tmp_path)
    files.open("mine")
    _drive(tmp_path, {"namespace": "pid:[1]"})
    assert files.status().state == "running", "what cannot be seen may live"
    living = repeated(files.update, 0.005, "signs of life")
    with living, pytest.raises(ConfigError, match="in use by process"):
        ControlFiles(tmp_path).open("mine")


def _drive(folder: Path, changes: dict) -> None:
    written = json.loads((folder / "status.json").read_text())
    written["driver"] |= changes
    (folder / "status.json").write_text(json.dumps(written))


@pytest.fixture
def left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlFiles:
    """The folder of a driver of another host that should be running."""
    monkeypatch.setattr(control, "INTERVAL_S", 0.001)
    monkeypatch.setattr(control, "SILENT_S", 0.2)
    files = ControlFiles(tmp_path)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-2")
        files.open("mine")
    return files


def test_a_folder_in_which_a_driver_of_another_host_lives_is_not_taken(
    left_running: ControlFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(control, "SILENT_S", 10.0)
    refused = rf"in use by process {os.getpid()} on node-2\. Stop that run"
    living = repeated(left_running.update, 0.005, "signs of life")
    with living, pytest.raises(ConfigError, match=refused):
        ControlFiles(tmp_path).open("mine")
    assert left_running.driver()["host"] == "node-2"
    assert "was left running by a driver on node-2: waiting" in capsys.readouterr().out


def test_a_folder_is_taken_from_a_driver_that_ends_or_gives_no_sign_of_life(
    left_running: ControlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ControlFiles(tmp_path).require_free()
    assert left_running.status().state == "dead", "so that it is waited for once"
    ControlFiles(tmp_path).open("mine")
    assert left_running.driver()["host"] == socket.gethostname()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-3")
        monkeypatch.setattr(control, "SILENT_S", 10.0)
        timer = threading.Timer(0.02, left_running.update, kwargs={"state": "stopped"})
        timer.start()
        ControlFiles(tmp_path).open("mine")
        timer.join()
    assert left_running.driver()["host"] == "node-3"


def test_a_driver_without_progress_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LIFE_SIGN_S", 0.001)
    with reporting_status("mine", tmp_path) as files:
        files.begin_stage("sft")
        first = files.status()
        deadline = time.monotonic() + 5
        while (found := files.status()).updated == first.updated:
            assert time.monotonic() < deadline
        assert found == replace(first, updated=found.updated), "and changes nothing else"
        for iteration in range(100):
            files.update(iteration=iteration)
            assert files.status().iteration == iteration, "nor undoes what is told meanwhile"
    last = files.status().updated
    time.sleep(0.02)
    assert files.status().updated == last
