import asyncio
import gc
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import ConfigError, DataError, RlhfError
from rlhf_ray.rewards.functions import FunctionSource
from rlhf_ray.types import Rollout

CODE = '''
import asyncio
import json
import os
import re
import signal
import sys
import time

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def echo(prompts, completions, completion_ids, level):
    """Fails where its arguments are not what TRL would give."""
    assert completion_ids == [[5, 6]] * len(prompts)
    return [level[i] * 10 + len(prompts[i]) for i in range(len(prompts))]

def longer(completions, *args):
    assert args == ()
    return [float(len(text)) for text in completions]

def chat(prompts, completions, **columns):
    assert "messages" not in columns
    return [len(p[-1]["content"]) + len(c[0]["content"]) for p, c in zip(prompts, completions)]

async def slowly(completions):
    await asyncio.sleep(0.001)
    return [None if "skip" in text else 1 for text in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = float(solution_str == ground_truth)
    return {"score": right, "acc": 1} if data_source == "gsm" else right + extra_info["bonus"]

async def acompute_score(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str == ground_truth)

def reward_func(queries, prompts, labels):
    import torch
    right = [q == p + l for q, p, l in zip(queries, prompts, labels)]
    return {"rewards": torch.tensor(right), "extra_logs": {}}

def column_of_one(queries, prompts, labels, **more):
    import numpy
    return numpy.array([[0.25]] * len(queries))

def short(completions):
    return [1.0]

def words(completions):
    return ["good"] * len(completions)

def none(completions):
    return None

def broken(completions):
    return [1 / 0]

def broken_in_a_library(completions):
    return json.loads("no JSON")

def leaves(completions):
    exit(3)

async def leaves_later(completions):
    sys.exit(0)

def interrupts(completions):
    raise KeyboardInterrupt

def crashes(completions):
    os.kill(os.getpid(), signal.SIGSEGV)

def process(completions):
    return [float(os.getpid())] * len(completions)

def remembers(completions):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(1)  # as math_verify does; only a main thread may
    signal.alarm(0)
    remembers.calls = getattr(remembers, "calls", 0) + 1
    return [remembers.calls] * len(completions)

def hangs(completions):
    while "hang" in completions:
        time.sleep(0.01)
    return [float(len(text)) for text in completions]

def hangs_at_one(data_source, solution_str, ground_truth, extra_info=None):
    while solution_str == "hang":
        pass
    return float(len(solution_str))

def never_lets_go(completions):
    """At one text, holds the interpreter: no other thread of the process runs."""
    if "hang" in completions:
        re.match(r"(a+)+$", "a" * 60 + "b")
    return [1.0] * len(completions)

async def meets(completions):
    """Returns once another call has come as well."""
    meets.calls = getattr(meets, "calls", 0) + 1
    while meets.calls < 2:
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)

def with_a_loop_of_its_own(completions):
    return asyncio.run(slowly(completions))

def stops(completions):
    return [next(iter([]))]

def prints(completions):
    for _ in range(3):
        print("scoring", flush=True)
    return [1.0] * len(completions)

def arguments(completions):
    return [float(len(sys.argv))] * len(completions)
'''

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    return path


def score(path: Any, name: str, rollouts: list[Rollout], **keys: Any) -> list[float | None]:
    config = FunctionSourceConfig(type="function", function=f"{path}:{name}", **keys)
    return asyncio.run(FunctionSource(config).score(rollouts))


@pytest.fixture
def two(rollout: Callable[..., Rollout]) -> list[Rollout]:
    """Two rollouts; the second's row lacks the first's columns."""
    return [rollout("yes", "a", level=2), rollout("skip it", "bc", level=3)]


def test_trl(file: Path, two: list[Rollout]) -> None:
    assert score(file, "length", two) == [3.0, 7.0]
    assert score(file, "echo", two) == [21.0, 32.0]


def test_trl_with_further_positional_arguments(file: Path, rollout: Callable[..., Rollout]) -> None:
    assert score(file, "longer", [rollout("yes")]) == [3.0]
    assert score(file, "longer", [rollout("yes", args=1)]) == [3.0]


def test_trl_async_and_a_sample_that_the_function_leaves_out(
    file: Path, two: list[Rollout]
) -> None:
    assert score(file, "slowly", two) == [1.0, None]


def test_trl_gets_a_chat_as_messages(file: Path, rollout: Callable[..., Rollout]) -> None:
    messages = [{"role": "user", "content": "four"}]
    assert score(file, "chat", [rollout("abc", messages=messages)]) == [7.0]


def test_verl(file: Path, rollout: Callable[..., Rollout]) -> None:
    rows = [
        rollout("42", data_source="gsm", reward_model={"style": "rule", "ground_truth": "42"}),
        rollout("41", data_source="math", ground_truth="42", extra_info={"bonus": 0.5}),
    ]
    assert score(file, "compute_score", rows, signature="verl") == [1.0, 0.5]
    assert score(file, "acompute_score", rows, signature="verl") == [1.0, 0.0]


def test_verl_without_a_ground_truth(file: Path, two: list[Rollout]) -> None:
    with pytest.raises(DataError, match="prompt 7 has neither a column ground_truth"):
        score(file, "compute_score", two, signature="verl")


def test_openrlhf(file: Path, rollout: Callable[..., Rollout]) -> None:
    rows = [rollout("x", answer="x"), rollout("y", answer="x"), rollout("")]
    keys = {"signature": "openrlhf", "label_column": "answer"}
    assert score(file, "reward_func", rows, **keys) == [1.0, 0.0, 1.0]
    assert score(file, "column_of_one", rows, **keys) == [0.25] * 3


def test_by_module_name(file: Path, two: list[Rollout], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert score("my_rewards", "length", two) == [3.0, 7.0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short", "gave 1 scores for 2 responses"),
        ("words", "gave 'good' as a score; give a number or None"),
        ("none", "gave None for 2 responses"),
        ("broken", r"raised ZeroDivisionError: division by zero \(.*my_rewards\.py, line \d+\)"),
        # The user's own line, not the last one, which lies in json's decoder.
        ("broken_in_a_library", r"raised JSONDecodeError: .* \(.*my_rewards\.py, line 59\)"),
        ("leaves", r"raised SystemExit: 3 \(.*my_rewards\.py, line 62\)"),
        ("leaves_later", r"raised SystemExit: 0 \(.*my_rewards\.py, line 65\)"),
        ("stops", r"raised StopIteration:  \(.*my_rewards\.py, line \d+\)"),
    ],
)
@pytest.mark.parametrize("in_process", [False, True])
def test_what_a_function_may_not_do(
    file: Path, two: list[Rollout], name: str, says: str, in_process: bool
) -> None:
    with pytest.raises(RlhfError, match=rf"rewards: function: .*:{name} {says}"):
        score(file, name, two, in_process=in_process)


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


def test_a_column_that_is_not_there(file: Path, rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(DataError, match="takes level, which the prompts lack; they have prompts"):
        score(file, "echo", [rollout("x", other=1)])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{file}:lenght", "has no function lenght; it has length, echo"),
        ("nowhere.py:f", "FileNotFoundError: nowhere.py does not exist"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("{folder}/leaves.py:f", "SystemExit: 5"),
        ("{folder}/crashes.py:f", "its process exited with 7"),
    ],
)
def test_a_function_that_is_not_there(file: Path, spec: str, says: str) -> None:
    (file.parent / "leaves.py").write_text("exit(5)")
    (file.parent / "crashes.py").write_text("import os; os._exit(7)")
    function = spec.format(file=file, folder=file.parent)
    config = FunctionSourceConfig(type="function", function=function)
    with pytest.raises(ConfigError, match=says):
        FunctionSource(config)
