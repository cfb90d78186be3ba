"""Two peers in one process; the cluster is in tests/integration/test_two_nodes.py."""

import socket

import pytest

from rlhf_ray.doctor import bandwidth
from rlhf_ray.doctor.bandwidth import Peer
from rlhf_ray.doctor.node_readings import read_node


def test_a_peer_measures_what_another_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SECONDS", 0.05)
    sender, receiver = Peer("127.0.0.1"), Peer("127.0.0.1")
    assert receiver.receive("127.0.0.1", sender.port()) > 0.1
    assert receiver.receive("127.0.0.1", sender.port()) > 0.1  # it serves one after the other


def test_a_peer_that_cannot_be_reached_is_an_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            Peer("127.0.0.1").receive("127.0.0.1", port)


def test_this_machine_is_read() -> None:
    reading = read_node("127.0.0.1")
    assert reading.interface.startswith("lo")
    assert reading.versions["ray"] != "none"
    assert reading.open_files > 0
