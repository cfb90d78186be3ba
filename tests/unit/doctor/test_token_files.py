from pathlib import Path

import pytest

from rlhf_ray.doctor.preflight import NOTE, OK
from rlhf_ray.doctor.token_files import check_token_files


def test_a_token_that_others_can_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    assert check_token_files().verdict == OK
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("s3cret")
    token.chmod(0o644)
    check = check_token_files()
    assert check.verdict == NOTE
    assert f"chmod 600 {token}" in check.remedy
    token.chmod(0o600)
    assert check_token_files().verdict == OK
    other = tmp_path / "elsewhere"
    other.write_text("s3cret")
    other.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert str(other) in check_token_files().remedy
