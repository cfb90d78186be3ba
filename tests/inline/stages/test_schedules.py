"""Length of a supervised stage, its learning rate over time, and its evaluations."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import get_scheduler

from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.stages.supervised import launcher as supervised
from rlhf_ray.stages.supervised import pretrain, sft, trainer
from rlhf_ray.stages.supervised.arguments import arguments
from rlhf_ray.stages.supervised.pretrain import PretrainTraining

MakeRun = Callable[..., Config]

BLOG = {"learning_rate": 1e-5, "final_lr_share": 0.1, "warmup_share": 0.03, "warmup_steps": 5}


def rates(config: Config, folder: Path) -> list[float]:
    """The learning rate of each step of pretrain, and the one after the last."""
    args = arguments(PretrainTraining(config, folder, "base"), 1)
    steps = config.pretrain.steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("steps", "warmup"), [(100, 5), (1000, 30)])
def test_cosine_falls_to_a_tenth_of_the_peak_after_a_warm_up_of_a_share_but_five_steps_at_least(
    make_run: MakeRun, tmp_path: Path, steps: int, warmup: int
) -> None:
    found = rates(make_run(pretrain=BLOG | {"steps": steps}), tmp_path)
    peak = 1e-5
    assert found[: warmup + 1] == pytest.approx([peak * n / warmup for n in range(warmup + 1)])
    assert max(found) == found[warmup] == peak
    middle = warmup + (steps - warmup) // 4
    progress = (middle - warmup) / (steps - warmup)
    assert found[middle] == pytest.approx(
        peak * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
    )
    assert found[-1] == pytest.approx(0.1 * peak, rel=1e-9)


def test_further_settings_of_the_scheduler_are_kept(make_run: MakeRun, tmp_path: Path) -> None:
    more = {"trainer": {"lr_scheduler_kwargs": {"num_cycles": 1.5}}}
    found = rates(make_run(pretrain=BLOG | more | {"steps": 100}), tmp_path)
    # The first of two valleys lies a third of the way from step 5 to step 100.
    assert found[37] == pytest.approx(1e-6, rel=0.01)
    assert found[69] > 9e-6


def test_final_lr_share_is_refused_without_cosine() -> None:
    with pytest.raises(
        ConfigError, match=r"reward\.final_lr_share 0\.1 needs reward\.scheduler cosine"
    ):
        resolve({"reward": {"final_lr_share": 0.1, "scheduler": "linear"}})


@pytest.mark.parametrize(
    ("epochs", "rows", "batch_size", "steps"),
    [(1.0, 8, 4, 2), (3.0, 9, 4, 9), (0.5, 100, 10, 5), (0.25, 9, 4, 1)],
)
def test_epochs_are_passes_whose_last_batch_may_be_small(
    make_run: MakeRun, tmp_path: Path, epochs: float, rows: int, batch_size: int, steps: int
) -> None:
    config = make_run(pretrain={"epochs": epochs, "batch_size": batch_size})
    work = supervised.with_steps(PretrainTraining(config, tmp_path, "base"), rows)
    assert work.settings.steps == steps
    unsaid = PretrainTraining(make_run("unsaid"), tmp_path, "base")
    assert supervised.with_steps(unsaid, rows) is unsaid


def of_batches(config: Config, rows: int) -> list[int]:
    """Rows of each batch that a training over so many rows sees."""
    seen: list[int] = []

    class Counting(PretrainTraining):
        def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            seen.append(len(rows))
            return super().collate(rows)

    pretrain.run(config)  # makes the base
    seen.clear()
    work = supervised.open_training(Counting, config, f"{config.run.dir}/pretrain/base")
    block = {"input_ids": [5] * 8, "labels": [5] * 8, "position_ids": list(range(8))}
    for part, num in (("train", rows), ("held_out", 1)):
        Dataset.from_list([block] * num).save_to_disk(str(work.data / part))
    trained = supervised.run_training(work, rows)
    assert trained.steps == len(seen) - 2  # evaluated before and after
    return seen[1:-1]


def test_every_row_is_seen_as_often_as_there_are_epochs(make_run: MakeRun) -> None:
    assert of_batches(make_run(pretrain={"epochs": 2.0}), rows=10) == [4, 4, 2, 4, 4, 2]


def test_the_curve_of_evaluations_begins_before_and_ends_after(make_run: MakeRun) -> None:
    config = make_run(pretrain={"steps": 5, "eval_every": 2})
    summary = pretrain.run(config)
    folder = Path(config.run.dir) / "pretrain"
    records = read_jsonl(folder / "eval.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    for record in records:
        assert set(record) == {"step", "eval_loss", "eval_perplexity"}
        assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
    losses = [record["eval_loss"] for record in records]
    assert (losses[0], losses[-1]) == (summary["loss_before"], summary["loss_after"])
    assert losses == sorted(losses, reverse=True)
    assert len(read_jsonl(folder / "metrics.jsonl")) == 5


def test_evaluated_after_each_epoch_a_killed_stage_has_the_curve_of_a_whole_one(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"epochs": 3.0, "eval_every": "epoch", "packing": "none", "trainer": {"save_steps": 3}}
    configs = [make_run(name, sft=keys) for name in ("whole", "killed")]
    for config in configs:
        pretrain.run(config)
    per_epoch = sft.run(configs[0])["steps"] // 3
    whole = Path(configs[0].run.dir) / "sft" / "eval.jsonl"
    assert [r["step"] for r in read_jsonl(whole)] == [per_epoch * epoch for epoch in range(4)]

    class Killed(BaseException):
        pass

    class Killer(trainer.StepLog):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == per_epoch + 4:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "StepLog", Killer)
        with pytest.raises(Killed):
            sft.run(configs[1])
    sft.run(configs[1])
    killed = Path(configs[1].run.dir) / "sft" / "eval.jsonl"
    assert killed.read_text() == whole.read_text()
    assert json.loads(killed.read_text().splitlines()[-1])["step"] == per_epoch * 3
