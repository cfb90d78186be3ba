"""The first starts of a run's generators: how many are waited for, and which are tried again."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Generic

from rlhf_ray.errors import ActorFailure, PlacementError
from rlhf_ray.generators.member import GeneratorT, Lateness, Member

LOOK_S = 0.1
"""Longest interval between two looks at the generators."""


class FirstStarts(Generic[GeneratorT]):
    """The generators that a run begins with, while they start."""

    def __init__(
        self,
        starts: Mapping[Member[GeneratorT], "asyncio.Future[None]"],
        lose: Callable[[Member[GeneratorT], Exception], None],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            starts: the task of each generator's first start; where it succeeds, the generator is
                up (`Member.change` is None).
            lose: starts a generator again.
            say: prints a line.
        """
        self._starts = starts
        self._lose = lose
        self._say = say
        self._lost: set[Member[GeneratorT]] = set()

    async def wait(self, num_needed: int, require_left: Callable[[], None]) -> None:
        """Wait until ``num_needed`` are up, and the others up, failed or late.

        Those that are late are left to start; one that fails then is started again, too.

        Raises:
            Exception: that of all first starts, where they fail alike.
            ActorFailure: from ``require_left``: too few are left.
        """
        lateness, num_up = Lateness(), 0
        while True:
            self._take_failures()
            num_up = self._report(num_up)
            require_left()
            waiting = [start for start in self._starts.values() if not start.done()]
            if num_up >= num_needed and (not waiting or lateness.left_s() <= 0):
                break
            if waiting:
                await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            else:  # for those that are started again
                await asyncio.sleep(LOOK_S)
        for start in waiting:
            start.add_done_callback(lambda _: self._take_failures())

    def _report(self, num_before: int) -> int:
        num_up = sum(member.change is None for member in self._starts)
        if num_up > num_before and len(self._starts) > 1:
            self._say(f"{num_up} of {len(self._starts)} generators up")
        return num_up

    def _take_failures(self) -> None:
        """Start those again whose start has failed, unless all have, and alike.

        A death, or a start without progress, may be the fault of the machine, at any number of
        generators. What an engine refuses it would refuse again, unless another one is up.

        Raises:
            Exception: theirs.
        """
        failed = {
            member: error
            for member, start in self._starts.items()
            if member not in self._lost
            and start.done()
            and not start.cancelled()
            and isinstance(error := start.exception(), Exception)
        }
        refused = [m for m, e in failed.items() if not isinstance(e, ActorFailure | PlacementError)]
        num_done = sum(start.done() for start in self._starts.values())
        if refused and len(refused) == num_done:
            said = {(type(failed[m]), str(failed[m]).replace(m.name, "")) for m in refused}
            if num_done < len(self._starts):
                return  # the others may be refused alike
            if len(said) == 1:
                raise failed[refused[0]]
        for member, error in failed.items():
            self._lost.add(member)
            self._lose(member, error)
