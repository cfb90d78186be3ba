"""The process of its own in which a reward function runs: its start, its deadlines, its end."""

import asyncio
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from user_functions import score

from actors.reward_scorer import RewardScorer
from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.functions import FunctionSource
from rlhf_ray.types import Rollout

BESIDE = '''
from __future__ import annotations
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

@dataclass
class Row:
    text: str

def size(row):
    return float(len(row.text))

def pooled(completions):
    """Looks its own module up, as pickle does, and imports one beside it."""
    from helper_beside import bonus
    with ProcessPoolExecutor(1) as pool:
        return [bonus + size for size in pool.map(size, map(Row, completions))]
'''


def test_a_process_that_crashes_is_an_error_that_says_how(file: Path, two: list[Rollout]) -> None:
    with pytest.raises(RlhfError, match=r":crashes: its process was ended by SIGSEGV"):
        score(file, "crashes", two)
    with pytest.raises(RlhfError, match=r"raised KeyboardInterrupt"):
        score(file, "interrupts", two)


def test_a_function_has_the_main_thread_of_one_process_of_its_own(
    file: Path, two: list[Rollout]
) -> None:
    assert score(file, "process", two)[0] not in (None, float(os.getpid()))
    assert score(file, "process", two, in_process=True) == [float(os.getpid())] * 2
    config = FunctionSourceConfig(type="function", function=f"{file}:remembers")
    source = FunctionSource(config)
    assert [asyncio.run(source.score(two)) for _ in range(2)] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("in_process", [False, True])
def test_a_function_may_run_an_event_loop(file: Path, two: list[Rollout], in_process: bool) -> None:
    assert score(file, "with_a_loop_of_its_own", two, in_process=in_process) == [1.0, None]


@pytest.mark.parametrize("name", ["beside.py", "datasets.py"])
@pytest.mark.parametrize("in_process", [False, True])
def test_a_file_is_a_module_with_others_beside_it_and_stands_for_no_library(
    tmp_path: Path,
    two: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    in_process: bool,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / name).write_text(BESIDE)
    (tmp_path / "helper_beside.py").write_text("bonus = 1")
    assert score(tmp_path / name, "pooled", two, in_process=in_process) == [4.0, 8.0]
    assert not hasattr(importlib.import_module("datasets"), "pooled")


def test_a_function_may_print_where_nobody_reads(file: Path, two: list[Rollout]) -> None:
    ours, (reader, writer) = os.dup(1), os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 1)
        assert score(file, "prints", two) == [1.0, 1.0]
    finally:
        os.dup2(ours, 1)
        os.close(ours)
        os.close(writer)


def test_a_function_finds_no_arguments_of_ours(file: Path, two: list[Rollout]) -> None:
    assert score(file, "arguments", two) == [1.0, 1.0]


def test_async_calls_run_beside_each_other(file: Path, two: list[Rollout]) -> None:
    config = FunctionSourceConfig(type="function", function=f"{file}:meets")
    source = FunctionSource(config)

    async def twice() -> list[list[float | None]]:
        return list(await asyncio.gather(source.score(two), source.score(two)))

    assert asyncio.run(twice()) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("name", "signature"), [("hangs", "trl"), ("hangs_at_one", "verl")], ids=["trl", "verl"]
)
def test_a_response_at_which_a_function_hangs_alone_has_no_score(
    file: Path,
    rollout: Callable[..., Rollout],
    caplog: pytest.LogCaptureFixture,
    name: str,
    signature: str,
) -> None:
    rows = [rollout(text, ground_truth="") for text in ("a", "hang", "bcd")]
    found = score(file, name, rows, signature=signature, timeout_s=1.0)
    assert found == [1.0, None, 3.0]
    assert "did not return within 1 s (timeout_s) for responses to the prompts 7" in caplog.text


@pytest.mark.parametrize(
    ("name", "signature"), [("hangs", "trl"), ("hangs_at_one", "verl")], ids=["trl", "verl"]
)
def test_many_responses_at_which_a_function_hangs_end_no_call(
    file: Path,
    rollout: Callable[..., Rollout],
    caplog: pytest.LogCaptureFixture,
    name: str,
    signature: str,
) -> None:
    config = FunctionSourceConfig(
        type="function", function=f"{file}:{name}", signature=signature, timeout_s=1.0
    )
    source = FunctionSource(config, limit_s=2.5)
    rows = [rollout(text, ground_truth="") for text in ("a", *["hang"] * 8)]
    started = time.monotonic()
    found = asyncio.run(source.score(rows))
    assert time.monotonic() - started < 8  # nine seconds and more without a limit
    assert found == [1.0, *[None] * 8]
    assert "took more than 2.5 s for a shard" in caplog.text
    assert asyncio.run(source.score(rows[:1])) == [1.0]  # nothing hangs in the process any more


def test_a_function_that_gets_on_is_not_taken_for_hanging_however_long_its_shard_takes(
    file: Path, rollout: Callable[..., Rollout]
) -> None:
    config = FunctionSourceConfig(
        type="function", function=f"{file}:takes_its_time", signature="verl"
    )
    source = FunctionSource(config, limit_s=2.0)
    scorer = RewardScorer("reward-0", [config], lambda: {config.name: source}, limit_s=2.2)
    scorer.start()
    found = asyncio.run(scorer.score([rollout("a", ground_truth="")] * 5))
    assert found == {config.name: (1.0,) * 5}  # after three seconds


def test_an_answer_is_not_kept_back_by_a_call_that_never_lets_go(
    file: Path, rollout: Callable[..., Rollout]
) -> None:
    rows = [rollout(text) for text in ("a", "hang", "bcd")]
    config = FunctionSourceConfig(type="function", function=f"{file}:never_lets_go", timeout_s=1.0)
    source = FunctionSource(config)

    async def twice() -> list[list[float | None]]:
        return list(await asyncio.gather(source.score(rows), source.score(rows)))

    assert asyncio.run(twice()) == [[1.0, None, 1.0]] * 2


def test_a_process_ends_with_its_source(file: Path, two: list[Rollout]) -> None:
    pid = score(file, "process", two)[0]
    assert pid is not None
    gc.collect()
    assert not psutil.pid_exists(int(pid))
