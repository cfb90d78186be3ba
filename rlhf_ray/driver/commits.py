"""The last commit of a run: collected from the learners, restored to them, written to disk.

It is held as handles, which stay in the object store; the driver fetches the bytes when it writes
them to the run's folder.
"""

import asyncio
from dataclasses import asdict

from rlhf_ray.driver.checkpoint import Checkpoints, RunState
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.roles import Roles
from rlhf_ray.types import Commit


class Commits:
    """Holds the commit that every failure restores; saves it and marks the best one."""

    def __init__(self, roles: Roles, checkpoints: Checkpoints, recorder: Recorder) -> None:
        self._roles = roles
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._last: Commit | None = None

    async def hold(self, state: RunState) -> None:
        """Collect the learners' state as the last commit."""
        learners = self._roles.learners
        states = await asyncio.gather(*(learner.state() for learner in learners.values()))
        groups = dict(zip(learners, states, strict=True))
        self._last = Commit(state.version, groups, asdict(state))

    async def restore(self, state: RunState) -> None:
        """Load the last commit into the learners, and hold it as that of ``state``."""
        groups = self._held().groups
        learners = self._roles.learners
        await asyncio.gather(*(learner.load(groups[name]) for name, learner in learners.items()))
        self._last = Commit(state.version, groups, asdict(state))

    async def save(self, iteration: int) -> None:
        """Write the last commit to the run's folder, as the last step of its iteration.

        A resumed run cuts its records back to the commit, so this iteration's records must be
        written before the commit is.
        """
        commit = self._held()
        with self._recorder.phase("save", iteration):
            groups = {name: await self._roles.fetch(state) for name, state in commit.groups.items()}
            self._checkpoints.save(commit.version, groups, commit.progress)

    async def keep_best(self, state: RunState) -> None:
        """Save the current version unless it is saved, and mark it as best.

        The score is written last: a run killed before that evaluates and marks again.
        """
        if not self._checkpoints.has(state.version):
            await self.save(state.iteration)
        self._checkpoints.mark_best(state.version)
        self._checkpoints.set_progress(state.version, asdict(state))

    def _held(self) -> Commit:
        assert self._last is not None, "nothing was committed yet"
        return self._last
