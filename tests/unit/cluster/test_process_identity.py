"""A process is recognised whatever the clock does, and never mistaken for another one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.cluster import process_identity
from rlhf_ray.cluster.process_identity import (
    ProcessIdentity,
    identity,
    is_visible,
    living_process,
    same_process,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@linux_only
@pytest.mark.parametrize("step_s", [-3600.0, -1.0, 1.0, 86400.0])
def test_a_process_is_the_same_after_a_step_of_the_clock(
    other: subprocess.Popen[bytes], step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, started = identity(psutil.Process(other.pid)), psutil.Process(other.pid).create_time()
    boot_time = psutil._pslinux.boot_time()  # type: ignore[attr-defined]
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time + step_s)  # type: ignore[attr-defined]
    assert psutil.Process(other.pid).create_time() != pytest.approx(started, abs=0.5)
    assert living_process(entry) is not None
    assert identity(psutil.Process(other.pid)) == entry


def changed(entry: ProcessIdentity, **changes: Any) -> Any:
    return {**entry, **changes}


def test_a_dead_process_is_gone(other: subprocess.Popen[bytes]) -> None:
    entry = identity(psutil.Process(other.pid))
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert living_process(entry) is None, "as a zombie"
    other.wait()
    assert living_process(entry) is None


def test_a_reused_id_is_another_process() -> None:
    own = identity()
    earlier = changed(own, started=own["started"] - 1)
    assert living_process(own) is not None
    assert living_process(earlier) is None
    assert not same_process(own, earlier)
    assert same_process(own, changed(own, name="renamed"))


def test_a_process_of_an_earlier_boot_is_gone() -> None:
    entry = changed(identity(), boot="another")
    assert living_process(entry) is None
    assert is_visible(entry), "so it is known to be gone"


def test_a_process_of_another_container_is_not_looked_up() -> None:
    entry = changed(identity(), namespace="pid:[1]")
    assert living_process(entry) is None
    assert not is_visible(entry), "so it may live"
    assert not same_process(identity(), entry)


@linux_only
def test_a_name_with_parentheses_and_spaces_is_read() -> None:
    code = "open('/proc/self/comm', 'w').write('a) S 1 (b'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        entry = identity(psutil.Process(process.pid))
        assert entry["started"] >= identity()["started"]
        assert living_process(entry) is not None
        process.kill()


def test_without_proc_a_process_is_known_by_the_kernels_start_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_identity, "PROC", tmp_path)
    process_identity.boot_id.cache_clear()
    entry = identity()
    assert entry["boot"] == entry["namespace"] == ""
    assert entry["started"] == psutil.Process(os.getpid()).create_time()
    assert living_process(entry) is not None
    monkeypatch.undo()
    process_identity.boot_id.cache_clear()
