"""Tests of what a process reports, and of its own end where it makes no progress."""

import asyncio
import itertools
import subprocess
import sys

import pytest

from rlhf_ray.observability import phases
from rlhf_ray.observability.phases import Stalled, count, read_count, report, reported
from rlhf_ray.observability.phases import while_it_moves as moves


@pytest.fixture(autouse=True)
def _nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_phase", "")
    monkeypatch.setattr(phases, "_done", {})
    monkeypatch.setattr(phases, "_read", {})


def test_a_report_has_the_phase_and_the_units_of_each_kind() -> None:
    assert reported() == ""
    count(1200, "tokens sampled")
    count(34, "tokens sampled")
    assert reported() == "1,234 tokens sampled"
    report("loading the model")
    read_count("tokens in flight", itertools.count(5).__next__)
    assert reported() == "loading the model; 1,234 tokens sampled, 5 tokens in flight"
    assert reported().endswith("6 tokens in flight")
    read_count("tokens in flight", lambda: 1 // 0)
    assert reported() == "loading the model; 1,234 tokens sampled"


async def test_work_that_moves_is_awaited_and_its_errors_are_its_own() -> None:
    async def work(error: Exception | None = None) -> str:
        for _ in range(10):
            await asyncio.sleep(0.05)
            count(1, "rows computed")
        if error:
            raise error
        return "done"

    assert await moves(work(), 1.0, "key") == "done"
    with pytest.raises(TimeoutError, match="its own"):
        await moves(work(TimeoutError("its own")), 1.0, "key")


async def test_work_that_stands_still_is_cancelled() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(Stalled, match=r"within 0 s, the last 0\.1 s \(key\) without any progress"):
        await moves(work(), 0.1, "key")
    await asyncio.wait_for(ended.wait(), 5)


HANGS = """
import time
from rlhf_ray.observability.phases import count, ends_when_stalled, report
with ends_when_stalled(1.0, "cluster.call_timeout_s", "sft-1"):
    for _ in range(10):
        time.sleep(0.05)
        count(1, "rows learnt")
    {then}
print("lived")
"""


def run(then: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGS.format(then=then)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_that_hangs_ends_itself_and_shows_its_stacks() -> None:
    hung = run("time.sleep(60)")
    assert hung.returncode == 1
    assert (
        "sft-1 made no progress for 1 s (cluster.call_timeout_s) and is ended. It last reported: "
        "10 rows learnt. Its threads:" in hung.stderr
    )
    assert 'File "<string>", line 8' in hung.stderr


def test_a_process_in_a_phase_has_more_time() -> None:
    saved = run('report("saving"); time.sleep(1.6)')
    assert (saved.returncode, saved.stdout) == (0, "lived\n")
