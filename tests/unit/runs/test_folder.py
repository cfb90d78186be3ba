"""Which folders a run takes, and which modes it leaves them."""

import os
import stat
from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.errors import ConfigError
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.pipeline import open_run


def folder_at(path: Path) -> RunFolder:
    return RunFolder(load(None, [f"run.dir={path}"]))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_that_holds_something_keeps_its_mode(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    (home / "notes.txt").touch()
    open_run(folder_at(home))
    assert mode(home) == 0o755
    empty = tmp_path / "empty"
    empty.mkdir()
    open_run(folder_at(empty))
    assert mode(empty) == 0o700


def test_an_empty_setgid_folder_stays_open_to_its_group_and_to_nobody_else(tmp_path: Path) -> None:
    for before, after in ((0o2770, 0o2770), (0o2750, 0o2750), (0o2775, 0o2700), (0o750, 0o700)):
        team = tmp_path / f"{before:o}"
        team.mkdir()
        team.chmod(before)
        open_run(folder_at(team))
        assert mode(team) & 0o777 == after & 0o777, f"{before:o}"


def test_a_link_to_other_storage_is_followed_and_stays(tmp_path: Path) -> None:
    link, scratch = tmp_path / "runs", tmp_path / "scratch"
    link.symlink_to(scratch / "x")
    open_run(folder_at(link))
    assert mode(scratch / "x") == 0o700
    open_run(RunFolder(load(None, [f"run.dir={link}", "run.resume=never"])))
    assert link.is_symlink()
    assert sorted(path.name[:6] for path in scratch.iterdir()) == ["x", "x.old-"]
    assert (scratch / "x" / "config.yaml").is_file()


def test_a_folder_on_storage_without_modes_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Windows or some network storage, where files and folders all have mode 0777."""
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    file_status = os.fstat

    def without_modes(descriptor: int) -> os.stat_result:
        mode, *rest = file_status(descriptor)
        return os.stat_result((mode | 0o777, *rest))

    monkeypatch.setattr("os.fstat", without_modes)
    folder_at(folder).require_own()


@pytest.mark.parametrize("holds", [True, False])
def test_a_folder_that_everybody_can_write_to_is_refused_and_keeps_its_mode(
    tmp_path: Path, holds: bool
) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    if holds:
        (shared / "x").touch()
    with pytest.raises(ConfigError, match=r"can be written by everybody \(mode 1777\)"):
        open_run(folder_at(shared))
    assert mode(shared) == 0o1777
    assert not (shared / "config.yaml").exists()
    open_run(folder_at(shared / "run"))
    assert mode(shared / "run") == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused_before_it_is_read(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("[")
    (foreign / "status.json").write_text("[")
    os.chown(foreign, 12345, -1)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345, you are 0\)"):
        open_run(folder_at(foreign))
    for touch in (RunFolder.make, lambda folder: folder.stage("export")):
        with pytest.raises(ConfigError, match="belongs to another user"):
            touch(folder_at(foreign))
    assert sorted(path.name for path in foreign.iterdir()) == ["config.yaml", "status.json"]


def test_a_folder_on_storage_that_maps_users_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root's on network storage, where both folder and new files are nobody's."""
    folder = folder_at(tmp_path / "run")
    open_run(folder)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    open_run(folder)
    folder.stage("export")
    assert list(folder.path.glob("tmp*")) == []


def test_a_refused_command_changes_no_mode(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    config = load(None, [f"run.dir={folder}", "run.resume=must"])
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(RunFolder(config))
    assert mode(folder) == 0o755
