"""`rlhf-ray status` of a run with damaged control files says what is odd and shows the rest."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs.run_handles import find_run
from rlhf_ray.jobs.run_tables import status_table
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.runs.status import Request, RunStatus

GARBAGE = [
    *(b"", b"null", b"[1]", b"7", b'{"status": ', b"{}", bytes(range(256)), b"[" * 100_000),
    *(b'{"status": 3, "driver": {}}', b'{"status": {}, "driver": []}', b'{"a": 1' + b"0" * 5000),
]
ODD = (None, "text", [], [1], {}, {"a": 1}, float("nan"), float("inf"), True, 10**400)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has begun."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    (folder / "config.yaml").write_text("run: {name: x}\n")
    ControlFiles(folder).open("x")
    return folder


@pytest.mark.parametrize("text", GARBAGE)
def test_a_damaged_status_is_one_message(run: Path, text: bytes) -> None:
    (run / "status.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"status\.json is damaged \(.*rlhf-ray report"):
        find_run(str(run), None).status()
    ControlFiles(run).update(state="finished")  # changes nothing, and ends no run
    ControlFiles(run).require_free()
    ControlFiles(run).open("x")
    assert find_run(str(run), None).status().state == "running"


def test_a_status_that_cannot_be_read_is_one_message(run: Path) -> None:
    (run / "status.json").unlink()
    (run / "status.json").symlink_to("status.json")
    with pytest.raises(ConfigError, match=r"status\.json is damaged \(Too many levels"):
        find_run(str(run), None).status()


def test_fields_of_another_kind_are_named_and_the_rest_is_shown(run: Path) -> None:
    written = json.loads((run / "status.json").read_text())
    generator = {"name": "generator-0", "state": "ready", "version": 1, "restarts": 0}
    written["status"] |= {"stage": "ppo", "generators": [generator]}
    for name in asdict(RunStatus("x", "y")):
        for odd in ODD:
            status = {**written["status"], name: odd}
            (run / "status.json").write_text(json.dumps({**written, "status": status}))
            try:
                found = find_run(str(run), None).status()
            except ConfigError:  # an integer of 400 digits
                continue
            status_table(found)
            assert name == "stage" or found.stage == "ppo"
            if name == "eta_s" and isinstance(odd, str | list | dict):
                assert found.message == "status.json is damaged; left out: eta_s"
    (run / "status.json").write_text(json.dumps({**written, "status": {"future": 1}}))
    found = find_run(str(run), None).status()
    assert found.message == "status.json is damaged; left out: folder, name"


def test_a_folder_of_an_earlier_version_shows_its_status(run: Path) -> None:
    written = json.loads((run / "status.json").read_text())
    del written["driver"]["boot"], written["driver"]["namespace"], written["status"]["message"]
    (run / "status.json").write_text(json.dumps(written))
    assert find_run(str(run), None).status().state == "dead"
    written["status"]["state"] = "finished"
    (run / "status.json").write_text(json.dumps(written))
    assert find_run(str(run), None).status().state == "finished"


@pytest.mark.parametrize("text", GARBAGE)
def test_a_damaged_request_is_none(run: Path, text: bytes) -> None:
    (run / "asked.json").write_bytes(text)
    files = ControlFiles(run)
    if text != b"{}":
        assert files.requested() == Request()
    files.request(stop=True)
    assert files.requested() == Request(stop=True)


def test_a_folder_without_a_run_is_not_looked_for_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config\.yaml"):
        find_run(str(tmp_path), None)
    done = CliRunner().invoke(app, ["status", str(tmp_path / "absent")])
    assert isinstance(done.exception, ConfigError)
    assert f"There is no folder {tmp_path / 'absent'} here" in str(done.exception)


@pytest.mark.parametrize("address", ["http://[::1", "http://h:99999", "http://h:x"])
def test_an_address_that_is_none_is_one_message(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a cluster"):
        find_run("x", address)


def test_names_with_brackets_are_shown_as_they_are() -> None:
    from rich.console import Console

    status = RunStatus("[red]a[/b]", "\x1b]0;title\x07", message="[/]")
    console = Console(width=200, force_terminal=False)
    with console.capture() as shown:
        console.print(status_table(status))
    assert "[red]a[/b] in \\u001b]0;title\\u0007" in shown.get()
