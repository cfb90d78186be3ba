"""Judge the readings of a cluster's nodes and say what to fix: pure functions, without Ray."""

import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rlhf_ray.doctor.bandwidth import Link
from rlhf_ray.doctor.node_readings import NOT_INSTALLED, NodeReading
from rlhf_ray.doctor.nvidia_driver import LOCKS, has_kernels, lock_for, oldest_driver
from rlhf_ray.doctor.preflight import (
    FAIL,
    GB,
    NOTE,
    OK,
    Check,
    check_compiler,
    check_memory,
    check_shm,
    check_system,
)

OPEN_FILES_NEEDED = 65_536
"""Ray opens some hundred files per process, and warns below this limit itself."""
TEMPORARY_DISK_NEEDED = 10 * GB
"""Ray spills objects to the disk of temporary files."""
PRIVATE_PORTS = (3000, 8000, 8265, 9090)
"""The ports that docs/security.md keeps on loopback."""
GPU_FREE_SHARE = 0.95
"""Less free memory than this means that another process uses the GPU."""


def checks_of(reading: NodeReading, interface: str | None) -> list[Check]:
    """Return all checks of one node, also against ``cluster.interface``."""
    machine = reading.machine
    return [
        check_system(machine),
        _check_driver(reading),
        *_check_kernels(reading),
        *_check_gpus(reading),
        check_compiler(machine),
        _check_ninja(reading),
        check_memory(machine),
        check_shm(machine),
        _check_limits(reading),
        _check_disk(reading),
        _check_orphans(reading),
        _check_interface(reading, interface),
        _check_ports(reading),
        _check_token(reading),
    ]


def _check_driver(reading: NodeReading) -> Check:
    if not reading.driver:
        return Check("driver", "no NVIDIA GPU")
    if lock_for(reading.driver):
        return Check("driver", reading.driver)
    return Check(
        "driver", reading.driver, FAIL, f"install NVIDIA driver {oldest_driver()} or newer"
    )


def _check_kernels(reading: NodeReading) -> Iterator[Check]:
    """Check that the packages have kernels for the GPUs: an image is built without seeing them."""
    if not reading.driver or reading.torch_cuda is None:
        return
    cuda = reading.torch_cuda.partition(".")[0]
    text = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    lock = next((name for name, built_for, _ in LOCKS if built_for == f"CUDA {cuda}"), None)
    without = [
        f"{name} ({capability})"
        for name, capability in reading.capabilities.items()
        if lock and not has_kernels(lock, capability)
    ]
    if lock and not without:
        yield Check("torch", text)
        return
    missing = f", no kernels for {', '.join(without)}" if without else ""
    best = lock_for(reading.driver, reading.capabilities.values())
    remedy = "run scripts/setup.sh there, or build the image with"
    fitting = f"{remedy} scripts/requirements/{best}.txt" if best else "these GPUs are not served"
    yield Check("torch", f"{text}{missing}", FAIL, fitting)


def _check_gpus(reading: NodeReading) -> Iterator[Check]:
    if not reading.gpus:
        return
    text = ", ".join(f"{gpu.free / 1024:.0f} of {gpu.total / 1024:.0f}" for gpu in reading.gpus)
    busy = [i for i, gpu in enumerate(reading.gpus) if gpu.free < GPU_FREE_SHARE * gpu.total]
    if busy:
        remedy = f"GPU {', '.join(map(str, busy))} in use by another process: see nvidia-smi"
        yield Check("GPU memory", f"{text} GiB free", NOTE, remedy)
    else:
        yield Check("GPU memory", f"{text} GiB free")


def _check_ninja(reading: NodeReading) -> Check:
    if reading.ninja:
        return Check("ninja", reading.ninja)
    remedy = "start Ray with the environment's bin folder on PATH: DeepSpeed builds with ninja"
    return Check("ninja", "not found", NOTE, remedy)


def _check_limits(reading: NodeReading) -> Check:
    lock = "any" if reading.memlock < 0 else f"{reading.memlock / GB:.1f} GB"
    text = f"{reading.open_files} open files, {lock} locked memory"
    if reading.open_files < OPEN_FILES_NEEDED:
        remedy = f"run ulimit -n {OPEN_FILES_NEEDED} before ray start"
        return Check("limits", text, NOTE, remedy)
    if reading.gpus and reading.memlock >= 0:
        return Check(
            "limits",
            text,
            NOTE,
            "run ulimit -l unlimited before ray start if the nodes use InfiniBand",
        )
    return Check("limits", text)


def _check_disk(reading: NodeReading) -> Check:
    text = f"{reading.temporary_disk / GB:.1f} GB free for temporary files"
    if reading.temporary_disk >= TEMPORARY_DISK_NEEDED:
        return Check("disk", text)
    remedy = f"free {TEMPORARY_DISK_NEEDED // GB} GB, or start Ray with --temp-dir on another disk"
    return Check("disk", text, NOTE, remedy)


def _check_orphans(reading: NodeReading) -> Check:
    if not reading.orphans:
        return Check("orphans", "none")
    remedy = "the next local run on that node ends them; or end them by hand"
    return Check("orphans", f"{reading.orphans} processes of dead runs", NOTE, remedy)


def _check_interface(reading: NodeReading, required: str | None) -> Check:
    text = reading.interface or "none has Ray's address"
    if required is None or reading.interface == required:
        return Check("interface", text, OK if reading.interface else NOTE)
    remedy = f"cluster.interface is {required}: start Ray there with its --node-ip-address"
    return Check("interface", text, FAIL, remedy)


def _check_ports(reading: NodeReading) -> Check:
    if reading.binding:
        remedy = "start Ray with --node-ip-address set to an address of this node"
        return Check(
            "ports", f"none can be opened at Ray's address: {reading.binding}", FAIL, remedy
        )
    listed = [f"{port} at {' and '.join(at)}" for port, at in reading.listening.items()]
    text = ", ".join(listed) or "none of Ray's fixed ports in use"
    opened = [p for p in PRIVATE_PORTS if any(map(_is_open, reading.listening.get(p, ())))]
    if not opened:
        return Check("ports", text)
    remedy = (
        f"{', '.join(map(str, opened))} can be reached from other machines: bind it to 127.0.0.1 "
        "and reach it through ssh -L (docs/security.md)"
    )
    return Check("ports", text, NOTE, remedy)


def _is_open(address: str) -> bool:
    return not ipaddress.ip_address(address).is_loopback


def _check_token(reading: NodeReading) -> Check:
    if reading.requires_token:
        return Check("token", "Ray asks for one")
    remedy = "set RAY_AUTH_MODE=token wherever Ray is started: anyone who reaches it can run code"
    return Check("token", "Ray asks for none", NOTE, remedy)


def check_versions(readings: Mapping[str, NodeReading]) -> list[Check]:
    """Check that every package has the same version on all nodes; no check without readings."""
    if not readings:
        return []
    checks, same = [], []
    for package in next(iter(readings.values())).versions:
        counts = Counter(reading.versions[package] for reading in readings.values())
        usual, _ = counts.most_common(1)[0]
        if len(counts) == 1:
            same += [f"{package} {usual}"] if usual != NOT_INSTALLED else []
            continue
        versions = [f"{r.versions[package]} on {n}" for n, r in readings.items()]
        remedy = f"install {package} {usual} everywhere, or use the same image on all nodes"
        checks.append(Check("versions", f"{package}: {', '.join(versions)}", FAIL, remedy))
    return [Check("versions", "the same on all: " + ", ".join(same)), *checks]


def check_links(links: Sequence[Link], floor_gbit_s: float) -> list[Check]:
    """Check that every pair of nodes reaches a bandwidth."""
    checks = []
    for link in links:
        name, speed = f"{link.sender} -> {link.receiver}", f"{link.gbit_s:.2f} Gbit/s"
        if link.problem:
            remedy = "open all ports between the nodes (docs/security.md)"
            checks.append(Check(name, link.problem, FAIL, remedy))
        elif link.gbit_s < floor_gbit_s:
            remedy = f"under {floor_gbit_s:g} (--min-bandwidth): start Ray on the fast network"
            checks.append(Check(name, speed, FAIL, remedy))
        else:
            checks.append(Check(name, speed))
    return checks
