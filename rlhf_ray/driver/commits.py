"""The last commit of a run: collected from the learners, restored to them, written to disk.

It is held as handles, which stay in the object store; the bytes are fetched and written beside the
next iteration. A commit is on disk before the next one that is due is made.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from rlhf_ray.config import Config
from rlhf_ray.disk import may_pass
from rlhf_ray.driver.checkpoint import Checkpoints, RunState
from rlhf_ray.driver.guards import Alarm
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.errors import CheckpointError, DataLost
from rlhf_ray.roles import Roles
from rlhf_ray.types import Commit, StateFiles

SLOW_S = 1.0
"""A run that waits longer than this for its previous commit has a disk that is too slow."""
SPARE = 2.0
"""More commits are saved again once the time between them is this many times that of a write: at
the edge the interval would go back and forth, with a wait each time."""
RETRY_S = 10.0
"""Seconds between two looks for space on a full disk."""
TIMES_AGAIN = 2
"""How often work whose data is lost is done again: an object store that loses more is broken."""

T = TypeVar("T")


class Commits:
    """Holds the commit that every failure restores; saves it and marks the best one."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        checkpoints: Checkpoints,
        recorder: Recorder,
        warn: Callable[[int, Alarm], None],
    ) -> None:
        """
        Args:
            config: the run's.
            roles: whose learners are committed.
            checkpoints: the commits on disk.
            recorder: of the run; its records of an iteration are on disk before the commit.
            warn: records and prints a warning about an iteration.
        """
        self._least_every = self._every = config.ppo.save_every
        self._patience_s = config.run.full_disk_wait_s
        self._roles = roles
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._warn = warn
        self._last: Commit | None = None
        self._writing: asyncio.Task[None] | None = None
        self._began = (0, 0.0)
        """Iteration whose commit was written last, and when that began."""
        self._write_s = 0.0
        """How long the last write took."""
        self._was_full = False
        self.samples_lost = 0
        """Number of samples that were sampled again because their data was lost."""

    def is_due(self, iteration: int) -> bool:
        """Return whether the commit of an iteration is to be saved."""
        return iteration % self._every == 0

    async def hold(self, state: RunState) -> None:
        """Collect the learners' state as the last commit."""
        await self._catch_up(state.iteration)
        learners = self._roles.learners
        states = await asyncio.gather(*(learner.state() for learner in learners.values()))
        groups = dict(zip(learners, states, strict=True))
        self._last = Commit(state.version, groups, asdict(state))

    async def restore(self, state: RunState) -> None:
        """Load the last commit into the learners, and hold it as that of ``state``."""
        await self._catch_up(state.iteration)
        groups = self.held.groups
        learners = self._roles.learners
        await asyncio.gather(*(learner.load(groups[name]) for name, learner in learners.items()))
        self._last = Commit(state.version, groups, asdict(state))

    async def despite_losses(
        self,
        state: RunState,
        iteration: int,
        work: Callable[[], Awaitable[T]],
        num_samples: int = 0,
    ) -> T:
        """Do work that begins at the last commit, and again where its data was lost.

        What is sampled again under the same seeds is the same. The learners go back to the commit:
        one group may have learnt what the other one lacks.

        Args:
            state: that of the commit.
            iteration: in which the work is done.
            work: samples, and returns when its data is needed no more.
            num_samples: number of samples of the run that it takes.

        Raises:
            DataLost: data was lost `TIMES_AGAIN` times more, or the commit's own is.
        """
        for left in reversed(range(TIMES_AGAIN + 1)):
            began_s = time.monotonic()
            try:
                return await work()
            except DataLost as lost:
                if not left:
                    raise
                await self.restore(state)
                self.samples_lost += num_samples
                self._recorder.outages.lost("driver", "data lost", time.monotonic() - began_s)
                self._warn(iteration, _data_lost(lost, left))
        raise AssertionError("the last time returns or raises")

    def save_beside(self, iteration: int) -> None:
        """Begin to write the last commit to the run's folder, while the next iteration runs.

        A resumed run cuts its records back to the commit, so this iteration's records must be
        written before. `hold` waits for it where the next commit is due.
        """
        assert self._writing is None, "the previous commit is still being written"
        self._began = iteration, time.monotonic()
        self._writing = asyncio.ensure_future(self._write(self.held, iteration))

    async def save(self, iteration: int) -> None:
        """Write the last commit, and return when it is on disk."""
        await self.written()
        self.save_beside(iteration)
        await self.written()

    async def written(self) -> None:
        """Wait until the commit that is being written, if any, is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._writing is not None:
            waited_from_s = time.monotonic()
            await asyncio.wait([self._writing])  # what cancels the caller must not cancel this
            if self._was_full:
                waited_s = time.monotonic() - waited_from_s
                self._recorder.outages.lost("driver", "full disk", waited_s)
            writing, self._writing = self._writing, None
            writing.result()

    async def save_last(self, recorded: int, newer_than: int) -> None:
        """Save the last commit, unless it is saved or was there when this process began.

        Args:
            recorded: the last iteration with records; a commit without them is none.
            newer_than: the version that was there.
        """
        await self.written()
        last = self._last
        if last is None or last.version <= newer_than or self._checkpoints.has(last.version):
            return
        if last.progress["iteration"] <= recorded:
            await self.save(last.progress["iteration"])

    async def keep_best(self, state: RunState) -> None:
        """Save the current version unless it is saved, and mark it as best.

        The score is written last: a run killed before that evaluates and marks again.
        """
        await self.written()
        version = state.version
        if not self._checkpoints.has(version):
            await self.save(state.iteration)
        await self._patiently(state.iteration, partial(self._checkpoints.mark_best, version))
        progress = partial(self._checkpoints.set_progress, version, asdict(state))
        await self._patiently(state.iteration, progress)

    async def _write(self, commit: Commit, iteration: int) -> None:
        began_s = time.monotonic()
        with self._recorder.phase("save", iteration):
            groups = {name: await self._roles.fetch(state) for name, state in commit.groups.items()}
            await self._patiently(iteration, partial(self._save, commit, groups))
        self._write_s = time.monotonic() - began_s

    def _save(self, commit: Commit, groups: Mapping[str, StateFiles]) -> None:
        self._recorder.sync()  # a commit without its records would leave a gap in them
        self._checkpoints.save(commit.version, groups, commit.progress)

    async def _patiently(self, iteration: int, write: Callable[[], None]) -> None:
        """Write in a thread; where the disk is full or a network's hangs, wait and write again."""
        began_s, self._was_full = time.monotonic(), False
        while True:
            try:
                self._recorder.flush()
                return await asyncio.to_thread(write)
            except (CheckpointError, OSError) as error:
                waited_s = time.monotonic() - began_s
                if not may_pass(error) or waited_s >= self._patience_s:
                    raise
                self._was_full = True
                self._warn(iteration, _disk_full(error, waited_s, self._patience_s))
            await asyncio.sleep(RETRY_S)

    async def _catch_up(self, iteration: int) -> None:
        """Wait for the previous commit where this one is due; save as often as the disk can."""
        if self._writing is None or not (self._writing.done() or self.is_due(iteration)):
            return
        waited_from_s = time.monotonic()
        await self.written()
        waited_s = time.monotonic() - waited_from_s
        if self._was_full:
            return
        began_at, began_s = self._began
        iteration_s = max(1e-3, (waited_from_s - began_s) / max(1, iteration - began_at))
        before = self._every
        if waited_s > SLOW_S:
            self._every = max(before, self._every_for(self._write_s, iteration_s))
            self._recorder.outages.lost("driver", "slow disk", waited_s)
        else:
            self._every = min(before, self._every_for(SPARE * self._write_s, iteration_s))
        if self._every != before:
            self._warn(iteration, _slow_disk(self._write_s, iteration_s, before, self._every))

    def _every_for(self, write_s: float, iteration_s: float) -> int:
        """Return the least interval, in iterations, in which such a write ends."""
        least = self._least_every
        return least * max(1, math.ceil(write_s / (least * iteration_s)))

    @property
    def held(self) -> Commit:
        """The last commit."""
        assert self._last is not None, "nothing was committed yet"
        return self._last


def _slow_disk(write_s: float, iteration_s: float, before: int, every: int) -> Alarm:
    numbers = {"save_s": write_s, "interval_s": before * iteration_s}
    took = f"Writing a commit to run.dir took {write_s:.0f} s, an iteration {iteration_s:.0f} s. "
    if every < before:
        text = f"{took}From now on one iteration in {every} is saved, no longer one in {before}"
        return Alarm("slow_disk", "save more", numbers, text)
    text = (
        f"{took}From now on one iteration in {every} is saved, until the disk is faster: a driver "
        "that dies repeats up to that many. Put run.dir on a faster disk, or set ppo.save_every"
    )
    return Alarm("slow_disk", "save fewer", numbers, text)


def _data_lost(lost: DataLost, left: int) -> Alarm:
    return Alarm(
        "data_lost",
        "sample again",
        {},
        f"{str(lost).partition('. Run again')[0]}. It is sampled again under the same seeds; the "
        f"run ends if that happens {left} times more in this iteration",
    )


def _disk_full(error: Exception, waited_s: float, patience_s: float) -> Alarm:
    return Alarm(
        "disk_full",
        "wait",
        {"waited_s": waited_s},
        f"{error}. The run waits and writes again, for {patience_s - waited_s:.0f} s more at most "
        "(run.full_disk_wait_s)",
    )
