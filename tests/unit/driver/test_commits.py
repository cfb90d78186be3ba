"""Commits are written beside the next iteration, by a disk that is slow, full or gone."""

import asyncio
import errno
import itertools
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import resolve
from rlhf_ray.driver import commits
from rlhf_ray.driver.checkpoint import Checkpoints, RunState
from rlhf_ray.driver.commits import Commits
from rlhf_ray.driver.guards import Alarm
from rlhf_ray.errors import CheckpointError
from rlhf_ray.observability.outages import Outages


class Learner:
    """A learner whose state is the number of times that it was asked."""

    asked = 0

    async def state(self) -> dict[str, bytes]:
        self.asked += 1
        return {"learner.safetensors": str(self.asked).encode()}


class Roles:
    """One group of learners."""

    def __init__(self) -> None:
        self.learners = {"policy": Learner()}

    async def fetch(self, state: Mapping[str, bytes]) -> Mapping[str, bytes]:
        return state


class Disk(Checkpoints):
    """Commits in a folder, whose writes begin once ``gate`` is open, and are noted in ``order``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 3, {})
        self.gate = threading.Event()
        self.gate.set()
        self.order: list[str] = []

    def save(self, version: int, *args: Any) -> None:
        self.gate.wait(20)
        super().save(version, *args)
        self.order.append(f"saved {version}")


class Records:
    """A recorder of phases alone."""

    def __init__(self) -> None:
        self.outages = Outages()

    def phase(self, name: str, iteration: int) -> Any:
        return nullcontext()

    def flush(self) -> None:
        """Every record is written."""

    def sync(self) -> None:
        """Every record is durable."""


class Run:
    """Commits over a disk, and the warnings about it."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.disk = Disk(folder)
        self.warnings: list[tuple[int, Alarm]] = []
        config = resolve({"run": {"full_disk_wait_s": keys.pop("wait_s", 60)}, "ppo": keys})
        roles: Any = Roles()
        records: Any = Records()
        self.outages: Outages = records.outages
        self.commits = Commits(
            config, roles, self.disk, records, lambda *warning: self.warnings.append(warning)
        )

    async def iterate(self, iteration: int) -> None:
        """Commit and begin to save as the loop does."""
        await self.commits.hold(RunState(iteration=iteration, version=iteration))
        self.disk.order.append(f"committed {iteration}")
        if self.commits.is_due(iteration):
            self.commits.save_beside(iteration)


def played(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))  # type: ignore[arg-type]


def test_an_iteration_runs_while_the_commit_before_it_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def scene() -> None:
        run.disk.gate.clear()
        await run.iterate(1)
        await asyncio.sleep(0.05)  # the next iteration's generation
        assert not run.disk.has(1)
        asyncio.get_running_loop().call_later(0.05, run.disk.gate.set)
        await run.iterate(2)
        await run.commits.written()

    played(scene)
    assert run.disk.order == ["committed 1", "saved 1", "committed 2", "saved 2"]
    assert run.warnings == []


def test_a_commit_that_is_not_due_waits_for_no_disk(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every=2)

    async def scene() -> None:
        await run.iterate(1)
        run.disk.gate.clear()
        for iteration in (2, 3):
            await run.iterate(iteration)
        run.disk.gate.set()
        await run.iterate(4)
        await run.commits.written()

    played(scene)
    committed = [f"committed {number}" for number in (1, 2, 3)]
    assert run.disk.order == [*committed, "saved 2", "committed 4", "saved 4"]


ITERATION_S = 8.0


class Clock:
    """Seconds that pass as a test says, not as busy as its machine is."""

    def __init__(self, run: Run, patch: pytest.MonkeyPatch) -> None:
        self._run = run
        self._now_s = self._written_s = 0.0
        patch.setattr(commits, "time", self)

    def monotonic(self) -> float:
        return self._now_s

    async def iterate(self, iterations: Iterable[int], writes_s: Iterable[float]) -> None:
        """Let iterations of `ITERATION_S` pass, whose commits take so long to write."""
        disk, held, seconds = self._run.disk, self._run.commits, iter(writes_s)
        for iteration in iterations:
            if held.is_due(iteration):  # it waits for the one before
                asyncio.get_running_loop().call_soon(self._end_write)
            await self._run.iterate(iteration)
            if held.is_due(iteration):
                disk.gate.clear()
                self._written_s = self._now_s + next(seconds)
                await asyncio.sleep(0)  # it begins
            next_s = self._now_s + ITERATION_S
            if held._writing is not None and self._written_s <= next_s:
                self._end_write()
                await asyncio.wait([held._writing])
            self._now_s = next_s

    def _end_write(self) -> None:
        self._now_s = max(self._now_s, self._written_s)
        self._run.disk.gate.set()


def test_a_slow_disk_gets_fewer_commits_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    clock = Clock(run, monkeypatch)
    played(lambda: clock.iterate(range(1, 4), [20.0, 1.0]))
    ((iteration, warning),) = run.warnings
    assert (iteration, warning.guard) == (2, "slow_disk")
    assert warning.numbers == {"save_s": 20.0, "interval_s": ITERATION_S}
    assert [number for number in range(1, 10) if run.commits.is_due(number)] == [3, 6, 9]
    assert "one iteration in 3 is saved" in warning.text
    assert list(run.outages.lost_s) == ["driver: slow disk"]


def test_a_disk_that_is_fast_again_gets_every_commit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, save_every=2)
    clock = Clock(run, monkeypatch)
    played(lambda: clock.iterate(range(1, 8), [60.0]))
    assert [number for number in range(1, 17) if run.commits.is_due(number)] == [8, 16]
    played(lambda: clock.iterate(range(8, 11), [0.1, 0.1]))
    assert [number for number in range(1, 7) if run.commits.is_due(number)] == [2, 4, 6]
    assert [warning.action for _, warning in run.warnings] == ["save fewer", "save more"]
    assert "one iteration in 2 is saved, no longer one in 8" in run.warnings[1][1].text


def test_a_disk_that_is_hardly_fast_enough_keeps_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would wait for it, save fewer, save more and wait again."""
    run = Run(tmp_path)
    clock = Clock(run, monkeypatch)
    played(lambda: clock.iterate(range(1, 15), itertools.cycle([9.5, 7.0])))
    assert [(at, warning.action) for at, warning in run.warnings] == [(2, "save fewer")]


def test_a_run_waits_for_space_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "RETRY_S", 0.01)
    run = Run(tmp_path)
    real, attempts = os.fsync, 0

    def full_at_first(descriptor: int) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            raise OSError((errno.ENOSPC, errno.EDQUOT, errno.ESTALE)[attempts % 3], "")
        real(descriptor)

    async def scene() -> None:
        monkeypatch.setattr(os, "fsync", full_at_first)
        await run.iterate(1)
        await run.iterate(2)
        await run.commits.written()

    played(scene)
    assert run.disk.order == ["committed 1", "saved 1", "committed 2", "saved 2"]
    assert [(at, warning.guard) for at, warning in run.warnings] == [(1, "disk_full")] * 3
    assert "waits and writes again" in run.warnings[0][1].text
    assert list(run.outages.lost_s) == ["driver: full disk"]


def test_a_disk_that_stays_full_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "RETRY_S", 0.01)
    run = Run(tmp_path, wait_s=0.3)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scene() -> None:
        monkeypatch.setattr(os, "fsync", full)
        await run.iterate(1)
        with pytest.raises(CheckpointError, match="No space left"):
            await run.iterate(2)

    played(scene)
    assert run.warnings


def test_what_cannot_be_written_for_another_reason_ends_the_run_at_the_next_commit(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "file", save_every=2)
    (tmp_path / "file").write_text("")

    async def scene() -> None:
        for iteration in (1, 2):
            await run.iterate(iteration)
        await asyncio.sleep(0.2)
        with pytest.raises(CheckpointError, match="Cannot write version 2"):
            await run.iterate(3)  # not due itself

    played(scene)


def test_what_cancels_the_run_leaves_the_write(tmp_path: Path) -> None:
    run = Run(tmp_path)

    async def scene() -> None:
        run.disk.gate.clear()
        await run.iterate(1)
        second = asyncio.ensure_future(run.iterate(2))
        await asyncio.sleep(0.02)
        second.cancel()
        with suppress(asyncio.CancelledError):
            await second
        run.disk.gate.set()
        await run.commits.written()

    played(scene)
    assert run.disk.order == ["committed 1", "saved 1"]
