"""Bases of other architectures than the tiny model's, through the supervised stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_runs import WORDS
from tiny_models import build_random

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.supervised import pretrain, sft

MakeRun = Callable[..., Config]
STEPS: dict[str, Any] = {"steps": 2, "batch_size": 4, "block_size": 32}


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., str]:
    """Writes a random model of a kind; returns its folder."""

    def build(kind: str, **shape: Any) -> str:
        return build_random(kind, tmp_path / kind, [f"Q: {word}?" for word in WORDS], **shape)

    return build


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_base_whose_texts_would_leak_is_refused_before_training_and_trained_unpacked(
    make_run: MakeRun, base: Callable[..., str], stage: str
) -> None:
    model = {"path": base("bloom"), "max_length": 64}
    run = {"pretrain": pretrain.run, "sft": sft.run}[stage]
    config = make_run("packed", model=model, **{stage: STEPS})
    with pytest.raises(ConfigError, match=rf"{stage}\.packing isolate: .*{stage}\.packing=none"):
        run(config)
    assert not (Path(config.run.dir) / stage / "metrics.jsonl").exists()
    single = make_run("single", model=model, **{stage: STEPS | {"packing": "none"}})
    assert run(single)["steps"] == 2


def test_an_opt_base_is_trained_on_texts_that_do_not_see_each_other(
    make_run: MakeRun, base: Callable[..., str]
) -> None:
    config = make_run(model={"path": base("opt"), "max_length": 64}, sft=STEPS | {"eval_rows": 999})
    packed = sft.run(config)["loss_before"]
    single = make_run("single", model=config.model.model_dump(), sft=STEPS | {"packing": "none"})
    assert packed == pytest.approx(sft.run(single)["loss_before"], rel=1e-5)


def test_an_unpacked_batch_masks_its_padding_under_flash_attention_too(
    make_run: MakeRun, tmp_path: Path
) -> None:
    model = {"attn_implementation": "flash_attention_2", "max_length": 64}
    training = sft.SftTraining(make_run(model=model, sft={"packing": "none"}), tmp_path, "base")
    vars(training)["pad_id"] = 99
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = training.collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert torch.equal(batch["position_ids"][0], torch.arange(3))
