"""The watchdog fires once where a run stalls, by the run's own pace."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import resolve
from rlhf_ray.config.guards import StallGuard
from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.stages.ppo import watchdog
from rlhf_ray.stages.ppo.watchdog import Watchdog, keep_stacks, watched


class Run:
    def __init__(self, guard: StallGuard, pace: tuple[float, ...] = ()) -> None:
        self.now, self.iteration = 100.0, 7
        self.kept = 0
        self.reports: list[str] = []
        self.watchdog = Watchdog(
            guard,
            pace,
            lambda: self.iteration,
            self.keep,
            lambda text, _: self.reports.append(text),
            lambda: self.now,
        )

    def keep(self) -> Path:
        self.kept += 1
        return Path("run/stacks/now")

    def look_after(self, seconds: float) -> None:
        self.now += seconds
        self.watchdog.look()


def test_a_run_that_stalls_is_reported_once_and_again_after_it_went_on() -> None:
    run = Run(StallGuard(factor=3, min_s=0), pace=(20.0, 10.0, 12.0))
    run.look_after(36.0)
    assert run.reports == []
    run.look_after(1.0)
    run.look_after(100.0)
    (text,) = run.reports
    assert "for 37 s" in text
    assert "usually takes 12 s, and the bound is 36 s" in text
    assert "run/stacks/now" in text
    run.iteration += 1
    run.look_after(1.0)
    assert run.reports == [text, ""]
    assert run.watchdog.bound_s == 3 * 16.0, "the pace follows the run"
    run.look_after(49.0)
    assert (len(run.reports), run.kept) == (3, 2)


@pytest.mark.parametrize(
    ("guard", "pace", "bound_s"),
    [
        (StallGuard(), (60.0,), 600.0),
        (StallGuard(), (2.0,), 120.0),
        (StallGuard(), (), 1800.0),
        (StallGuard(min_s=3600), (), 3600.0),
    ],
)
def test_the_bound_follows_from_the_pace_and_has_a_floor(
    guard: StallGuard, pace: tuple[float, ...], bound_s: float
) -> None:
    assert Run(guard, pace).watchdog.bound_s == bound_s


async def test_the_drivers_stacks_name_what_its_loop_waits_for(tmp_path: Path) -> None:
    async def waits_for_nobody() -> None:
        await asyncio.Event().wait()

    task = asyncio.ensure_future(waits_for_nobody())
    running = asyncio.get_running_loop()
    folder = await asyncio.to_thread(keep_stacks, tmp_path / "stacks", running)
    task.cancel()
    text = (folder / "driver.txt").read_text()
    assert "waits_for_nobody" in text
    assert "keep_stacks" in text, "threads are there as well"


async def test_a_run_that_hangs_is_in_its_warnings_and_status_until_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "INTERVAL_S", 0.01)
    files = ControlFiles(tmp_path)
    files.open("mine")
    stall = {"factor": 1, "min_s": 0, "first_s": 0.05}
    config = resolve({"run": {"dir": str(tmp_path)}, "guards": {"stall": stall}})
    loop: Any = SimpleNamespace(state=RunState(iteration=3))
    shown: list[bool] = []
    warnings: list[dict[str, Any]] = []
    recorder: Any = SimpleNamespace(
        history=list, stalled=shown.append, warning=lambda record: warnings.append(record)
    )
    told: list[str] = []

    async def until(is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not is_so():
                await asyncio.sleep(0.01)

    with watched(config, tmp_path, loop, recorder, told.append):
        await until(lambda: told)
        text = files.status().message or ""
        loop.state = RunState(iteration=4)
        await until(lambda: files.status().message is None)
    assert text.startswith("Nothing was committed for")
    assert shown[:2] == [True, False]
    assert (warnings[0]["iteration"], warnings[0]["guard"]) == (3, "stall")
    assert next((tmp_path / "stacks").iterdir()).joinpath("driver.txt").is_file()
    config = resolve({"run": {"dir": str(tmp_path)}, "guards": {"stall": stall | {"factor": 0}}})
    with watched(config, tmp_path, loop, recorder, told.append):
        await asyncio.sleep(0.1)
    assert len(told) == len(warnings), "0 switches it off"
