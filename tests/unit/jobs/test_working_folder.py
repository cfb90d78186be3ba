"""What of a working folder travels with a job."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs import working_folder
from rlhf_ray.jobs.working_folder import pack


def write(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def packed(folder: Path, archive: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    pack(folder, extra or {}, archive)
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name).decode() for name in opened.namelist()}


def test_code_and_configs_travel_and_runs_data_environments_and_secrets_do_not(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    kept = ("config.yaml", "models/mine.py", "models/data/words.txt", "runs.md")
    write(work, *kept)
    write(work, "runs/a/config.yaml", "data/rows.jsonl")
    write(work, ".venv/lib/a.py", ".git/HEAD", "models/__pycache__/mine.pyc", ".ruff_cache/x")
    write(work, "mine/pyvenv.cfg", "mine/lib/b.py", "sub/model.safetensors", "sub/rows.parquet")
    write(work, ".env", "sub/.env.local", "server.key")
    assert set(packed(work, tmp_path / "a.zip")) == set(kept)


def test_files_ignored_by_git_stay_and_new_files_travel(tmp_path: Path) -> None:
    work = tmp_path / "work"
    write(work, "known.py", "new.py", "scratch/notes.txt", "sub/local.txt")
    (work / ".gitignore").write_text("scratch/\n")
    (work / "sub" / ".gitignore").write_text("local.txt\n")
    for command in (["init", "-q"], ["add", "known.py"]):
        subprocess.run(["git", *command], cwd=work, check=True)
    names = set(packed(work, tmp_path / "a.zip"))
    assert names == {"known.py", "new.py", ".gitignore", "sub/.gitignore"}


def test_the_resolved_config_is_added_over_a_file_of_its_name(tmp_path: Path) -> None:
    work = tmp_path / "work"
    write(work, "submitted.yaml", "a.py")
    found = packed(work, tmp_path / "a.zip", {"submitted.yaml": "run: {}\n"})
    assert found == {"a.py": "x" * 10, "submitted.yaml": "run: {}\n"}


def test_a_large_folder_is_refused_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_folder, "MAX_BYTES", 3_000_000)
    write(tmp_path, "small.py")
    write(tmp_path, "big.bin", size=2_500_000)
    write(tmp_path, "sub/second.bin", size=600_000)
    with pytest.raises(ConfigError) as refused:
        pack(tmp_path, {}, tmp_path / "a.zip")
    text = str(refused.value)
    assert "has 3 MB to send, more than the limit of 3 MB" in text
    assert text.index("2.5 MB  big.bin") < text.index("0.6 MB  sub/second.bin")
    assert not (tmp_path / "a.zip").exists()
    write(tmp_path, "sub/second.bin", size=400_000)
    pack(tmp_path, {}, tmp_path.parent / "b.zip")
