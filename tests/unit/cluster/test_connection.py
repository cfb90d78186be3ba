"""A cluster that does not answer is found out in seconds, with the variable and the remedy."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from rlhf_ray.cluster import connection
from rlhf_ray.cluster.connection import head_problem, require_cluster
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import load
from rlhf_ray.doctor import cluster as doctor
from rlhf_ray.errors import PlacementError
from rlhf_ray.jobs.connection import connect


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIMEOUT_S", 1.0)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def silent() -> Iterator[str]:
    """A service that takes connections and says nothing, as a hung head does."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    """An address at which nothing listens any more."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_answers_has_no_problem() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert head_problem(f"127.0.0.1:{port}") is None
    server.stop(None)


def test_a_run_of_a_dead_cluster_ends_soon_and_names_variable_and_remedy(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead)
    began = time.monotonic()
    with (
        pytest.raises(PlacementError, match=rf"at .* \(RAY_ADDRESS is {dead}\): .*refused.*") as e,
        ray_session(load(None)),
    ):
        pass
    assert time.monotonic() - began < 5
    assert "unset it and set cluster.mode=local" in str(e.value)


def test_a_head_that_hangs_is_found_out(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(PlacementError, match="does not speak Ray's protocol within 1 s"):
        require_cluster()


@pytest.mark.parametrize("address", ["http://head:8265", "nonsense", "10.0.0.1:port", "local"])
def test_what_is_no_address_of_a_head_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PlacementError, match=rf"RAY_ADDRESS is {address}.*HEAD:6379"):
        require_cluster()


def test_without_a_cluster_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one")

    monkeypatch.setattr(connection, "canonicalize_bootstrap_address", none)
    with (
        pytest.raises(PlacementError, match=r"Could not find any .*; RAY_ADDRESS is not set\. Set"),
        ray_session(load(None, ["cluster.mode=ray"])),
    ):
        pass


def test_the_address_that_a_dead_head_left_behind_is_found_out(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "canonicalize_bootstrap_address", lambda _: dead)
    with pytest.raises(PlacementError, match="where Ray left the address of a cluster"):
        require_cluster()


def test_doctor_and_job_commands_end_soon_as_well(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead)
    with pytest.raises(PlacementError, match="No head of a Ray cluster answers"):
        doctor.run(None, 1.0)
    with pytest.raises(PlacementError, match=r"No head .* unset RAY_ADDRESS"):
        connect(None)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert not load(None).cluster.joins_cluster
