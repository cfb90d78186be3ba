"""Files of a working folder that travel with a job."""

import subprocess
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.errors import ConfigError
from rlhf_ray.jobs import working_folder
from rlhf_ray.jobs.working_folder import contents, pack


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


KEYS = [
    *(".ssh/id_ed25519", "id_rsa.bak", ".aws/credentials", "sub/.kube/config"),
    *(".docker/config.json", ".npmrc", "sub/.pypirc", ".git-credentials"),
    *("cert.p12", "Server.PEM", "prod.env", ".envrc"),
    *("my-service-account.json", "client_secret_1.json", ".ray-token-4711", "hf_token.txt"),
    *(".netrc", "state.tfstate", "kubeconfig.yaml", ".vault-token"),
    *(
        "Credentials.json",
        "credentials.toml",
        "credentials.properties",
        "kaggle.json",
        "passwords.txt",
    ),
]


def test_keys_stay_and_are_named(tmp_path: Path) -> None:
    work = tmp_path / "work"
    kept = {"tokenizer.py", "secrets.py", "environment.yaml", "keys.md", "credentials.py"}
    kept |= {"vocabulary/tokens.txt", "added_tokens.txt", "password_questions.txt"}
    write(work, *kept, *KEYS)
    (work / "deploy").write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{'b3BlbnNzaC1rZXk' * 3}\n")
    (work / "sa.json").write_text(
        '{"private_key": "-----BEGIN PRIVATE KEY-----\\n' + "MIIEvQIBADANBg" * 3 + '"}'
    )
    (work / "parser.py").write_text('KEY = re.compile("-----BEGIN [A-Z ]*PRIVATE KEY-----")')
    found = contents(work)
    kept.add("parser.py")
    assert {str(path) for path in found.sizes} == kept
    assert set(packed(work, tmp_path / "a.zip")) == kept
    assert {str(path) for path in found.withheld} == {*KEYS, "deploy", "sa.json"}
    assert f"{len(kept)} files travel, 0.0 MB" in str(found)
    assert f"{len(KEYS) + 2} files stay here, as they hold keys: " in str(found)


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    write(work, "a.py", ".env", "weights.pt")
    write(tmp_path, "outside.txt")
    (work / "within.py").symlink_to("a.py")
    (work / "renamed.txt").symlink_to(".env")
    (work / "broken.txt").symlink_to("nowhere")
    (work / "model.safetensors").symlink_to(tmp_path / "outside.txt")
    assert set(packed(work, tmp_path / "a.zip")) == {"a.py", "within.py"}
    (work / "link.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ConfigError, match=r"link\.txt is a link that leads out of the working fol"):
        pack(work, {}, tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()
    (work / "link.txt").unlink()
    (work / "folder").symlink_to(tmp_path)
    assert set(packed(work, tmp_path / "c.zip")) == {"a.py", "within.py"}


def test_a_working_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no working folder"):
        contents(tmp_path / "absent")


def test_a_dry_run_prints_what_would_travel_and_contacts_nobody(tmp_path: Path) -> None:
    work = tmp_path / "work"
    write(work, "a.py", "prod.env")
    (work / "config.yaml").write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    arguments = ["submit", str(work / "config.yaml"), "--working-dir", str(work), "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "--address", "http://nowhere.invalid:1"])
    assert done.exit_code == 0, done.output
    assert "2 files travel" in done.output
    assert "1 files stay here, as they hold keys: prod.env" in done.output
