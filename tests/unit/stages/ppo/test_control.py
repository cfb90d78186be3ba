"""PPO writes its status for others, and carries out their requests."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.generators.queue import NOTHING_YET
from rlhf_ray.observability.progress import Bar
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.stages.ppo import control as ppo_control
from rlhf_ray.stages.ppo.control import controlled
from rlhf_ray.types import GeneratorsReport, GeneratorStatus


@dataclass
class Loop:
    state: RunState
    stops: int = 0
    time: Any = field(default_factory=lambda: SimpleNamespace(ratio=0.75))

    def request_stop(self) -> None:
        self.stops += 1


@dataclass
class Pool:
    asked: list[int] = field(default_factory=list)

    def scale_to(self, num: int) -> None:
        self.asked.append(num)

    def statuses(self) -> list[GeneratorStatus]:
        return [GeneratorStatus("generator-0", "ready", 3, 1)]

    def report(self) -> GeneratorsReport:
        return GeneratorsReport(1, 2, restarts=1, samples_requeued=0, idle=NOTHING_YET)


@dataclass
class Watcher:
    """Stands in for the recorder, which shows the state of the generators."""

    seen: list[tuple[int, int, list[str]]] = field(default_factory=list)
    outages: Any = field(default_factory=lambda: SimpleNamespace(restarts={"policy": 2}))

    def generators(self, report: GeneratorsReport, names: list[str]) -> None:
        self.seen.append((report.ready, report.target, names))


async def test_status_is_written_and_each_request_carried_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_control, "INTERVAL_S", 0.001)
    files, loop, pool = ControlFiles(tmp_path), Loop(RunState(iteration=2, version=3)), Pool()
    files.open("mine")
    now = 0.0
    bar = Bar("ppo", 7, "iteration", 0, lambda: now)
    now = 10.0
    bar.advance(1, reward=0.25, kl=1.5)
    now = 12.0
    bar.advance(1)
    watcher: Any = Watcher()
    async with controlled(tmp_path, cast(Any, loop), cast(Any, pool), bar, watcher, print):
        await asyncio.sleep(0.02)
        status = files.status()
        assert loop.stops == 0
        files.request(num_generators=3)
        await asyncio.sleep(0.05)
        files.request(num_generators=2)
        await asyncio.sleep(0.05)
        files.request(num_generators=2)  # it may have been changed by itself in the meantime
        await asyncio.sleep(0.05)
        files.request(stop=True)
        await asyncio.sleep(0.05)
    assert (status.iteration, status.iterations, status.version) == (2, 7, 3)
    assert (status.reward, status.kl) == (0.25, 1.5)
    assert status.seconds_per_iteration == 2.0  # the second iteration, from 10 s to 12 s
    assert status.generators == tuple(pool.statuses())
    assert (status.restarts, status.effective_time_ratio) == ({"policy": 2}, 0.75)
    assert pool.asked == [3, 2, 2], "each request is carried out once"
    assert loop.stops > 0
    assert watcher.seen[0] == watcher.seen[-1] == (1, 2, ["generator-0"])


async def test_the_status_is_written_once_more_when_the_loop_has_ended(tmp_path: Path) -> None:
    files, loop = ControlFiles(tmp_path), Loop(RunState())
    files.open("mine")
    bar = Bar("ppo", 7, "iteration", 0, lambda: 0.0)
    async with controlled(
        tmp_path, cast(Any, loop), cast(Any, Pool()), bar, cast(Any, Watcher()), print
    ):
        loop.state = RunState(iteration=7)
    assert files.status().iteration == 7


async def test_a_request_that_fails_is_reported_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_control, "INTERVAL_S", 0.001)
    files, loop, pool, said = ControlFiles(tmp_path), Loop(RunState()), Pool(), list[str]()
    files.open("mine")
    errors = [OSError("no answer")] * 3

    def scale_to(num: int) -> None:
        if errors:
            raise errors.pop()
        pool.asked.append(num)

    monkeypatch.setattr(pool, "scale_to", scale_to)
    files.request(num_generators=3)
    bar = Bar("ppo", 7, "iteration", 0, lambda: 0.0)
    async with controlled(
        tmp_path, cast(Any, loop), cast(Any, pool), bar, cast(Any, Watcher()), said.append
    ):
        await asyncio.sleep(0.1)
    assert pool.asked == [3]
    (line,) = said
    assert line == "A request to the run failed and will be tried again: no answer"
