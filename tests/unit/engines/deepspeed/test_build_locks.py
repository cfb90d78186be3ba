"""Locks of builds: one of a killed process goes, one that somebody holds stays."""

import os
import threading
import time
from pathlib import Path

import pytest

from rlhf_ray.engines.deepspeed import build_locks
from rlhf_ray.engines.deepspeed.build_locks import wait_for_builds


def lock_in(root: Path, age_s: float) -> Path:
    lock = root / "py" / "operation" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


def test_an_old_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = lock_in(tmp_path, age_s=60)
    wait_for_builds(tmp_path, longest_s=30)
    assert not lock.exists()


def test_a_lock_that_is_held_is_left_alone(tmp_path: Path) -> None:
    lock = lock_in(tmp_path, age_s=60)
    with lock.open():
        wait_for_builds(tmp_path, longest_s=30)
    assert lock.exists()


def test_a_young_one_may_be_of_another_node_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_locks, "POLL_S", 0.01)
    lock = lock_in(tmp_path, age_s=0)
    threading.Timer(0.1, lock.unlink).start()
    started = time.monotonic()
    wait_for_builds(tmp_path, longest_s=30)
    assert 0.1 <= time.monotonic() - started < 5


def test_a_clock_that_is_ahead_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the node that shares the folder."""
    monkeypatch.setattr(build_locks, "POLL_S", 0.01)
    lock = lock_in(tmp_path, age_s=-1000)
    wait_for_builds(tmp_path, longest_s=0.1)
    assert not lock.exists()
