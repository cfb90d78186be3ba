"""A run's files are for its owner alone, and hold none of the secrets that it was given."""

import stat
from pathlib import Path

import pytest
from command_line import PLANTED

from rlhf_ray.cluster.session import role_environment
from rlhf_ray.config import load
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.pipeline import open_run


def test_nothing_that_a_run_writes_holds_a_secret_of_its_environment(whole_run: Path) -> None:
    files = [path for path in whole_run.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "trace.json"} <= {path.name for path in files}
    assert not [path for path in files if PLANTED.encode() in path.read_bytes()]


@pytest.mark.parametrize("joined", [True, False])
def test_rays_runtime_environment_holds_none_either(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, PLANTED)
    assert PLANTED not in str(role_environment(load(None), joined))


def test_a_runs_folder_is_its_owners_alone(whole_run: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(whole_run.stat().st_mode) == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    folder = RunFolder(load(None, [f"run.dir={tmp_path / 'open'}"]))
    open_run(folder)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.path.chmod(0o750)
    open_run(folder)  # it goes on: whom its owner let in stays in
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o750
    other = RunFolder(load(None, [f"run.dir={tmp_path / 'runs' / 'other'}"]))
    other.stage("export")  # by a command that needs no run
    assert stat.S_IMODE(other.path.stat().st_mode) == 0o700
