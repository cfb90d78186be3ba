import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from user_functions import score

from rlhf_ray.config.rewards import FunctionSourceConfig
from rlhf_ray.errors import ConfigError, DataError, RlhfError
from rlhf_ray.rewards.functions import FunctionSource
from rlhf_ray.types import Rollout


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
