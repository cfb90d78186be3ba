"""Warnings of a server that others can reach."""

from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.serving.serve import command, exposure_warning


@pytest.mark.parametrize(
    ("further", "warns"),
    [
        ([], False),
        (["--port=8001"], False),
        (["--host=127.0.0.1"], False),
        (["--host", "0.0.0.0", "--host", "localhost"], False),  # the last one wins
        (["--host=0.0.0.0"], True),
        (["--host", "10.0.0.1"], True),
    ],
)
def test_a_server_that_others_can_reach_gives_a_warning(further: list[str], warns: bool) -> None:
    warning = exposure_warning(further)
    assert (warning is not None) == warns
    if warning:
        assert f"--host {further[-1].rpartition('=')[2]} opens the server" in warning


def test_a_key_is_read_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for argument in ("--api-key", "--api-key=s3cret", "--api_key=s3cret", "--hf_token=s3cret"):
        with pytest.raises(ConfigError, match=r"export (VLLM_API_KEY|HF_TOKEN) instead") as error:
            command(load(None), further=[argument, "s3cret"])
        assert "s3cret" not in str(error.value)
    assert exposure_warning(["--host=0.0.0.0"]) is not None
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert exposure_warning(["--host=0.0.0.0"]) is None


def test_pickled_weights_are_not_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(DataError, match=r"holds no \*\.safetensors file"):
        command(load(None), [str(tmp_path)])
