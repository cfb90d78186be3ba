"""Settings with which Ray starts on a run's own machine, and the actors' logs that it shows."""

from typing import Any

import pytest
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from rlhf_ray.cluster.session import RAY_PRINT_HANDLER, ActorLog, num_logical_cpus, show_warnings
from rlhf_ray.config import load


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_every_process_of_a_stage_that_ray_trains_finds_a_cpu(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    keys = [f"{stage}.train_workers=40", f"{stage}.batch_size=40"]
    # Ray Train's controller has one as well.
    assert num_logical_cpus(load(None, keys)) > 40
    assert num_logical_cpus(load(None)) < 40


@pytest.fixture
def said() -> list[str]:
    return []


def batch(*lines: str, actor: str | None = "policy-0 v3 learning", **more: Any) -> dict[str, Any]:
    return {
        "lines": lines,
        "is_err": True,
        "actor_name": actor,
        "task_name": None,
        "pid": 7,
        "ip": "10.0.0.1",
        "localhost": "10.0.0.1",
        **more,
    }


def test_warnings_and_errors_are_shown_with_the_actors_name(said: list[str]) -> None:
    log = ActorLog(said.append)
    log(batch("loading", "WARNING: low on memory", "x.py:3: UserWarning: slow path"))
    log(batch("step done", actor="critic-0 idle"))
    log(batch("ValueError: bad", actor=None))
    log(batch("ERROR gone", ip="10.0.0.2"))
    assert said == [
        "policy-0 v3 learning: WARNING: low on memory",
        "policy-0 v3 learning: x.py:3: UserWarning: slow path",
        "process 7: ValueError: bad",
        "policy-0 v3 learning on 10.0.0.2: ERROR gone",
    ]


def test_what_goes_to_standard_output_stays_in_the_log_files(said: list[str]) -> None:
    ActorLog(said.append)(batch("ERROR in a sample text", is_err=False))
    assert said == []


def test_a_traceback_is_shown_whole(said: list[str]) -> None:
    lines = ["Traceback (most recent call last):", '  File "a.py", line 1', "    f()"]
    log = ActorLog(said.append)
    log(batch("begins", "  deeper", *lines, "KeyError: 'a'", "after"))
    assert [line.partition(": ")[2] for line in said] == [*lines, "KeyError: 'a'"]
    log(batch(*lines[:2], "    g()", "KeyError: 'a'"))  # another one, of the same error
    assert [line.partition(": ")[2] for line in said[4:]] == [*lines[:2], "    g()"]


def test_a_warning_of_every_rank_is_shown_once(said: list[str]) -> None:
    log = ActorLog(said.append)
    for rank in range(8):
        log(batch(f"WARNING: rank {rank} uses 0x{rank:x} buffers", actor=f"policy-{rank} v3 idle"))
    assert said == ["policy-0 v3 idle: WARNING: rank 0 uses 0x0 buffers"]


def test_warnings_replace_rays_own_printing(said: list[str]) -> None:
    printed: list[Any] = []
    dispatcher.add_handler(RAY_PRINT_HANDLER, printed.append)
    try:
        show_warnings(said.append)
        dispatcher.emit(batch("WARNING: low on memory", "loading"))
    finally:
        dispatcher.remove_handler(RAY_PRINT_HANDLER)
    assert said == ["policy-0 v3 learning: WARNING: low on memory"]
    assert printed == []
