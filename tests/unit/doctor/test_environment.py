"""What doctor says of temporary folder, RAY_ADDRESS, run folder and inputs; and long TMPDIRs."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.cluster import connection, session
from rlhf_ray.cluster.session import LONGEST_SOCKET, SOCKET_PATH_BYTES, ray_folder, role_environment
from rlhf_ray.config import Config, load
from rlhf_ray.disk import temporary_folder
from rlhf_ray.doctor import environment
from rlhf_ray.doctor.environment import (
    check_environment,
    check_ray_address,
    check_run_folder,
    check_temporary_folder,
)
from rlhf_ray.doctor.preflight import FAIL, NOTE, OK
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python remembers the folder that it has found."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR as of a Slurm job, too long for the path of a socket in it."""
    folder = tmp_path / ("job_" + "1234567_" * 10)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_ray_gets_a_folder_in_which_its_sockets_have_room(long: Path) -> None:
    assert temporary_folder() == long
    folder = ray_folder()
    assert not folder.is_relative_to(long)
    assert len(os.fsencode(folder)) + len(LONGEST_SOCKET) <= SOCKET_PATH_BYTES
    assert folder.parent.stat().st_mode & 0o077 == 0
    check = check_temporary_folder()
    assert check.verdict == OK
    assert f"too long for Ray's sockets, which get {folder}" in check.reading


def test_roles_of_this_machine_get_a_short_folder_too(long: Path) -> None:
    assert role_environment(Config(), joined=False)["TMPDIR"] == str(ray_folder().parent)
    assert "TMPDIR" not in role_environment(Config(), joined=True)


def test_a_short_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert ray_folder().parent == temporary_folder() / f"rlhf_ray-{os.getuid()}"
    assert "TMPDIR" not in role_environment(Config(), joined=False)


def test_without_a_short_folder_the_message_names_tmpdir_and_the_room(
    long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SOCKET_PATH_BYTES", 70)
    with pytest.raises(
        ConfigError, match=rf"Tried TMPDIR \({long}\), /tmp and /var/tmp.*Set TMPDIR"
    ):
        ray_folder()
    assert check_temporary_folder().verdict == FAIL


def test_no_folder_for_temporary_files_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match=r"TMPDIR is /nowhere\)\. Set TMPDIR to a folder"):
        temporary_folder()
    assert check_temporary_folder().verdict == FAIL


def test_a_tmpdir_that_cannot_be_used_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    check = check_temporary_folder()
    assert check.verdict == NOTE
    assert "absent cannot be used" in check.reading


def test_a_dead_cluster_in_ray_address_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIMEOUT_S", 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    _, check = check_environment(None)
    assert (check.name, check.verdict) == ("RAY_ADDRESS", FAIL)
    assert "unset it and set cluster.mode=local" in check.remedy


def test_a_dead_cluster_that_the_config_does_not_join_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check = check_ray_address(load(None, ["cluster.mode=local"]))
    assert check.verdict == OK
    assert "127.0.0.1:1, not used (cluster.mode)" in check.reading


def test_a_file_system_without_links_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, [f"run.dir={tmp_path}/deep/run"])
    assert check_run_folder(config).verdict == OK
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
    monkeypatch.setattr(Path, "symlink_to", _not_permitted)
    assert check_run_folder(config).verdict == NOTE


def _not_permitted(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_commit_is_saved_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "symlink_to", _not_permitted)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, {})
    for version in (1, 2, 3):
        checkpoints.save(version, {"policy": {"adapter": b"a"}}, {"iteration": version})
        checkpoints.mark_best(version)
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.version == 3


def test_doctor_reads_the_config_without_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "check_temporary_folder", lambda: check_run_folder(Config()))
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    text = "cluster: {mode: inline}\nrollout: {engine: transformers}\nrun: {stages: [%s]}\n"
    good.write_text(text % "prepare")
    bad.write_text(text % "ppo" + "data: {prompts: {path: absent.jsonl}}\n")
    run = CliRunner().invoke
    result = run(cli.app, ["doctor", str(bad)])
    assert result.exit_code == 2
    assert "absent.jsonl" in result.output
    result = run(cli.app, ["doctor", str(good), f"run.dir={tmp_path}/run"])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/run" in "".join(result.output.split()).replace("\n", "")
