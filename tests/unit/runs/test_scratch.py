"""Where a run's large temporary files lie, and when they are deleted."""

from pathlib import Path

import datasets
import pytest

from rlhf_ray.config import Config, resolve
from rlhf_ray.data.reading.tables import write_table
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.runs.scratch import scratch_folder
from rlhf_ray.stages import pipeline


def config_of(tmp_path: Path, name: str = "a", scratch: Path | None = None) -> Config:
    given = None if scratch is None else str(scratch)
    run = {"name": name, "dir": str(tmp_path / name), "stages": ["report"], "scratch": given}
    return resolve({"run": run})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of the tables that the stage of a run writes; the first start fails."""
    files: list[Path] = []

    def run_stage(config: Config, _: str) -> None:
        table = write_table([{"x": 1}], datasets.Features({"x": datasets.Value("int64")}))
        files.extend(Path(file["filename"]) for file in table.cache_files)
        (scratch_folder(config) / "kept").write_text("for the next start")
        if len(files) == 1:
            raise DataError("the first start fails")

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    return files


def test_tables_lie_in_the_runs_own_folder_of_the_scratch_until_it_is_done(
    tmp_path: Path, tables: list[Path]
) -> None:
    scratch = tmp_path / "scratch"
    config = config_of(tmp_path, scratch=scratch)
    with pytest.raises(DataError):
        pipeline.run(config)
    (own,) = scratch.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in own.iterdir()] == ["kept"]  # what a resumed run reads again
    (own / "tmp" / "rows-of-a-killed-process").mkdir(parents=True)
    pipeline.run(config)
    assert all(file.is_relative_to(own) for file in tables)
    assert list(scratch.iterdir()) == []


def test_runs_of_one_name_have_scratch_folders_of_their_own(tmp_path: Path) -> None:
    parents = tmp_path / "one", tmp_path / "other"
    folders = {scratch_folder(config_of(parent, scratch=tmp_path / "s")) for parent in parents}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "s" for folder in folders)


def test_without_a_scratch_it_is_in_the_runs_folder_and_tables_are_in_the_systems(
    tmp_path: Path, tables: list[Path]
) -> None:
    config = config_of(tmp_path)
    with pytest.raises(DataError):
        pipeline.run(config)
    assert (tmp_path / "a" / "scratch" / "kept").is_file()
    assert not any(file.is_relative_to(tmp_path / "a") for file in tables)
    pipeline.run(config)
    assert not (tmp_path / "a" / "scratch").exists()


def test_a_scratch_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = config_of(tmp_path, scratch=tmp_path / "file" / "scratch")
    with pytest.raises(ConfigError, match=r"run\.scratch .*cannot be made"):
        pipeline.run(config)
