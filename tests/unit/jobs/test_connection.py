"""Tests of the connection to a job server that accepts requests and never answers them."""

import socket

import pytest

from rlhf_ray.errors import PlacementError
from rlhf_ray.jobs import connection


def test_a_job_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PlacementError, match=r"Cannot use the job server .*timed out"):
            connection.connect(address)
