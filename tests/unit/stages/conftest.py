"""Runs outside of Ray and without a hub."""

import pytest


@pytest.fixture
def outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a hub to answer, each of its models would be asked for until a time-out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
