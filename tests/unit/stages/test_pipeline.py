"""What a run says as it enters Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_ray.config import Config, resolve
from rlhf_ray.stages import pipeline


@pytest.mark.parametrize("unguarded", [[], ["10.0.0.2", "10.0.0.3"]])
def test_a_joined_cluster_without_a_token_is_warned_of(
    unguarded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def session(_: Config) -> Iterator[None]:
        yield

    monkeypatch.setattr(pipeline, "ray_session", session)
    monkeypatch.setattr(pipeline, "require_same_view", lambda *_: unguarded)
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: None)
    config = {"run": {"dir": str(tmp_path / "run")}, "cluster": {"mode": "ray"}}
    pipeline.run_single(resolve(config), "ppo")
    said = " ".join(capsys.readouterr().out.split())
    assert ("no token on 10.0.0.2, 10.0.0.3: whoever reaches" in said) == bool(unguarded)
    assert ("warning" in said) == bool(unguarded)
