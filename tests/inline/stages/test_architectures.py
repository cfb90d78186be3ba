"""Bases of other architectures than the tiny model's, through the supervised stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_runs import WORDS
from tiny_models import build_random

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import loading
from rlhf_ray.stages.supervised import dpo, pretrain, sft
from rlhf_ray.stages.supervised import reward as reward_model

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


ADAPTED = {"sft": sft.run, "reward": reward_model.run, "dpo": dpo.run}


def of_stage(make_run: MakeRun, path: str, stage: str, keys: dict[str, Any]) -> Config:
    """A config of a stage alone, on a base that counts as the SFT model."""
    sections: dict[str, Any] = {"sft": {"path": path}}
    sections[stage] = {"steps": 2, "batch_size": 4} | keys
    if stage == "sft":
        sections["sft"] |= {"block_size": 32}
    return make_run(model={"path": path, "max_length": 64}, **sections)


PARTS: list[dict[str, Any]] = [
    {"target_modules": ["layers.1.self_attn.q_proj"]},
    {"peft": {"layers_to_transform": [1]}},
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", list(ADAPTED))
def test_an_adapter_on_part_of_a_model_is_loaded_before_the_stage_says_that_it_is_done(
    make_run: MakeRun, base: Callable[..., str], stage: str, part: dict[str, Any]
) -> None:
    path = base("llama")
    config = of_stage(make_run, path, stage, {"lora": {"r": 2} | part})
    ADAPTED[stage](config)
    folder = Path(config.run.dir) / stage / ("adapter" if stage == "sft" else "model")
    load = loading.load_sequence_classifier if stage == "reward" else loading.load_causal_lm
    names = [name for name, _ in load(str(folder), config.model).named_parameters()]
    assert {".layers.1." in name for name in names if "lora_" in name} == {True}


@pytest.mark.parametrize("stage", list(ADAPTED))
def test_a_stage_whose_folder_cannot_be_loaded_writes_no_summary(
    make_run: MakeRun, base: Callable[..., str], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: Any, tokenizer: Any, folder: Any, of: str) -> None:
        whole(model, tokenizer, folder, of)
        (Path(folder) / "adapter_model.safetensors").unlink()

    whole = loading.save_adapter
    monkeypatch.setattr(loading, "save_adapter", save)
    config = of_stage(make_run, base("llama"), stage, {})
    with pytest.raises(DataError, match=rf"{stage}.* cannot be loaded"):
        ADAPTED[stage](config)
    assert not (Path(config.run.dir) / stage / "summary.json").exists()


def test_a_tied_output_layer_is_refused_before_a_stage_trains_it(
    make_run: MakeRun, base: Callable[..., str]
) -> None:
    model = {"path": base("llama", tie_word_embeddings=True), "max_length": 64}
    keys = STEPS | {"lora": {"target_modules": ["lm_head"]}}
    with pytest.raises(ConfigError, match="weight of lm_head is that of the input embedding"):
        sft.run(make_run(model=model, sft=keys))
