"""Stages that tokenise as much of a large set as they train on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import Config
from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.stages.supervised import language_model, pretrain, sft, trainer

MakeRun = Callable[..., Config]


class KilledError(Exception):
    pass


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of texts that were tokenised together; sets count as large."""
    numbers: list[int] = []
    tokenize = Renderer.tokenize

    def counted(self: Renderer, rows: Any, ended: bool = True) -> Any:
        numbers.append(len(rows))
        return tokenize(self, rows, ended)

    monkeypatch.setattr(Renderer, "tokenize", counted)
    monkeypatch.setattr(drawn_rows, "BLOCK", 5)
    monkeypatch.setattr(language_model, "LARGE", 10)
    return numbers


@pytest.mark.parametrize("packing", ["isolate", "concat", "none"])
def test_a_training_reads_as_many_rows_as_fill_its_blocks(
    make_run: MakeRun, tokenised: list[int], packing: str
) -> None:
    few = {"steps": 1, "batch_size": 2, "eval_rows": 1, "packing": packing}
    rows: dict[str, Any] = pretrain.run(make_run("few", pretrain=few))["rows"]  # type: ignore[assignment]
    num_few = sum(tokenised)
    tokenised.clear()
    whole: Any = pretrain.run(make_run("whole", pretrain=few | {"epochs": 1.0}))
    assert num_few < sum(tokenised) == whole["rows"]["kept"]
    assert rows["kept"] == num_few
    assert rows["unread"] > 0
    assert sum(rows.values()) == sum(whole["rows"].values())


def test_its_first_blocks_are_those_of_a_longer_training(
    make_run: MakeRun, tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []
    monkeypatch.setattr(language_model, "run_training", stop_training)
    for steps in (1, 3):
        config = make_run(str(steps), pretrain={"steps": steps, "batch_size": 2})
        with pytest.raises(KilledError):
            pretrain.run(config)
        training = pretrain.PretrainTraining(config, Path(config.run.dir) / "pretrain", "base")
        blocks.append({part: training.load_data(part)[:] for part in ("train", "held_out")})
    assert blocks[0]["held_out"] == blocks[1]["held_out"]
    assert len(blocks[0]["train"]["input_ids"]) == 2
    assert blocks[0]["train"]["input_ids"] == blocks[1]["train"]["input_ids"][:2]


def stop_training(*_: object) -> None:
    raise KilledError


def test_a_run_that_trains_on_a_whole_set_keeps_its_order(
    make_run: MakeRun, tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of an older version does: its tokens were stored without a count of unread rows."""
    config = make_run(sft={"steps": 4, "trainer": {"save_steps": 2}})
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "LARGE", 10**6)
        pretrain.run(config)
        patch.setattr(trainer.StepLog, "on_step_begin", fail_after_two_steps, raising=False)
        with pytest.raises(KilledError):
            sft.run(config)
    training = sft.SftTraining(config, Path(config.run.dir) / "sft", "base")
    notes = json.loads(training.stored_file.read_text())
    training.stored_file.write_text(json.dumps(notes | {"digest": "of other settings"}))
    assert "unread" not in sft.run(config)["rows"]  # type: ignore[operator]


def fail_after_two_steps(_: Any, args: Any, state: Any, *rest: Any, **named: Any) -> None:
    if state.global_step == 2:
        raise KilledError
