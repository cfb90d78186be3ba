"""pretrain, sft, reward and merge on a tiny model, inline."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf_ray.config import Config, resolve
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import adapters, forward, loading, tiny
from rlhf_ray.serving import merge
from rlhf_ray.stages.supervised import pretrain, sft
from rlhf_ray.stages.supervised import reward as reward_model
from rlhf_ray.stages.supervised.pairs import load_training_pairs
from rlhf_ray.stages.supervised.reward import RewardTraining
from rlhf_ray.stages.supervised.sft import SftTraining

Trained = tuple[Config, dict[str, Any]]


def folder_of(config: Config) -> Path:
    return Path(config.run.dir)


def test_each_stage_learns_and_writes_what_it_returns(trained_run: Trained) -> None:
    config, summaries = trained_run
    for name, summary in summaries.items():
        path = folder_of(config) / name / "summary.json"
        assert json.loads(path.read_text()) == summary
        assert summary["steps"] == getattr(config, name).steps
        assert summary["seconds"] > 0
    for name in ("pretrain", "sft"):
        summary = summaries[name]
        assert summary["loss_after"] < summary["loss_before"] - 0.05
        assert summary["perplexity_after"] == pytest.approx(math.exp(summary["loss_after"]))
    # A random model of 300 tokens is about as unsure as a fair choice among them.
    assert 250 < summaries["pretrain"]["perplexity_before"] < 350
    assert summaries["sft"]["loss_before"] == pytest.approx(
        summaries["pretrain"]["loss_after"], abs=0.5
    )
    assert summaries["pretrain"]["tokens"] == 6 * 4 * 32
    assert summaries["reward"]["accuracy"] > 0.9
    assert 0 <= summaries["reward"]["accuracy_before"] <= 1
    lines = (folder_of(config) / "reward" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < 0.1 < json.loads(lines[0])["loss"]
    assert (summaries["reward"]["pairs_train"], summaries["reward"]["pairs_eval"]) == (100, 15)


def test_only_preferred_answers_are_fine_tuned_on(trained_run: Trained) -> None:
    _, summaries = trained_run
    assert summaries["pretrain"]["rows"] == {"kept": 240}
    assert summaries["sft"]["rows"] == {"kept": 120, "not_preferred": 120}


def test_metrics_have_one_line_a_step(trained_run: Trained) -> None:
    config, _ = trained_run
    lines = (folder_of(config) / "pretrain" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert set(records[0]) == {"step", "loss", "learning_rate", "grad_norm"}
    assert records[0]["learning_rate"] == 0.01  # cosine from the peak, no warm-up


def test_stages_leave_only_their_results(trained_run: Trained) -> None:
    config, _ = trained_run
    files = {"metrics.jsonl", "summary.json", "tensorboard"}
    expected = {"pretrain": {"base", "model"}, "sft": {"adapter", "model"}, "reward": {"model"}}
    for stage, results in expected.items():
        assert {path.name for path in (folder_of(config) / stage).iterdir()} == files | results


def test_plain_libraries_load_the_results(trained_run: Trained) -> None:
    config, _ = trained_run
    ids = torch.tensor([[5, 6, 7, 8]])
    for stage in ("pretrain", "sft"):
        folder = folder_of(config) / stage / "model"
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.use_cache
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    path = folder_of(config) / "reward" / "model"
    plain = AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    ours = loading.load_sequence_classifier(str(path), config.model, require_head=True)
    with torch.no_grad():
        scores_B = forward.sequence_scores(ours, ids, torch.ones_like(ids))
        torch.testing.assert_close(plain(ids).logits[:, 0], scores_B)


def test_sft_model_is_base_with_adapter(trained_run: Trained) -> None:
    config, summaries = trained_run
    ids = torch.tensor([[5, 6, 7, 8]])
    folder = folder_of(config) / "sft"
    with torch.no_grad():
        apart = loading.load_causal_lm(str(folder / "adapter"), config.model)(ids).logits
        merged = loading.load_causal_lm(str(folder / "model"), config.model)(ids).logits
    assert (apart - merged).abs().max() < 1e-4
    # One layer: r * (in + out) for four 32 x 32 and three 32 x 64 matrices.
    assert summaries["sft"]["trainable_parameters"] == 16 * (4 * 64 + 3 * 96)


def test_saved_reward_model_ranks_as_the_summary_says(trained_run: Trained) -> None:
    config, summaries = trained_run
    path = str(folder_of(config) / "reward" / "model")
    model = loading.load_sequence_classifier(path, config.model, require_head=True)
    training = RewardTraining(config, folder_of(config), path)
    pairs, _ = load_training_pairs(training)
    batch = training.collate(list(pairs["held_out"]))
    del batch["prompt_lengths"]
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    with torch.no_grad():
        scores_B = forward.sequence_scores(model, flat["input_ids"], flat["attention_mask"])
    scores_BP = scores_B.view(-1, 2)
    accuracy = (scores_BP[:, 0] > scores_BP[:, 1]).float().mean().item()
    assert accuracy == pytest.approx(summaries["reward"]["accuracy"])


def test_same_seed_gives_the_same_weights(trained_run: Trained, make_run: Any) -> None:
    config, summaries = trained_run
    again = make_run("again")
    assert pretrain.run(again)["loss_after"] == summaries["pretrain"]["loss_after"]
    names = ("model.safetensors", "tokenizer.json")
    for name in names:
        first, second = (folder_of(c) / "pretrain" / "model" / name for c in (config, again))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_sft_and_reward_over_a_quantised_base(make_run: Any, quantization: str) -> None:
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_layers": 1}
    config = make_run(
        model={"max_length": 64, "quantization": quantization, "tiny": shape | {"num_heads": 2}},
        reward={"learning_rate": 0.01},
    )
    pretrain.run(config)
    summary = sft.run(config)
    assert summary["loss_after"] < summary["loss_before"] - 0.05
    training = RewardTraining(config, folder_of(config), str(folder_of(config) / "sft" / "model"))
    model = training.load_model()
    proj = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert proj.weight.dtype in (torch.int8, torch.uint8)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    assert reward_model.run(config)["accuracy"] > 0.9


def test_sft_and_reward_in_full(trained_run: Trained, make_run: Any) -> None:
    source, _ = trained_run
    base = str(folder_of(source) / "pretrain" / "model")
    full = {"tuning": "full", "batch_size": 8, "learning_rate": 0.01}
    config = make_run(
        model={"path": base, "max_length": 64},
        sft=full | {"steps": 10, "block_size": 32},
        reward=full | {"steps": 20, "eval_rows": 15},
    )
    summary = sft.run(config)
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["trainable_parameters"] == summary["parameters"]
    assert "merge_survived" not in summary
    names = {path.name for path in (folder_of(config) / "sft").iterdir()}
    assert names == {"model", "metrics.jsonl", "summary.json", "tensorboard"}
    before = load_file(f"{base}/model.safetensors")
    after = load_file(folder_of(config) / "sft" / "model" / "model.safetensors")
    assert all(not torch.equal(before[name], weight) for name, weight in after.items())

    assert reward_model.run(config)["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(
        folder_of(config) / "reward" / "model"
    )
    assert model.num_labels == 1


def test_full_tuning_is_in_fp32_and_computes_in_half_precision(make_run: Any) -> None:
    config = make_run(model={"max_length": 64, "dtype": "bfloat16"}, sft={"tuning": "full"})
    training = SftTraining(config, folder_of(config), "base")
    assert (training.model_settings.dtype, training.autocast) == ("float32", "bf16")
    over_adapter = RewardTraining(config, folder_of(config), "base")
    assert (over_adapter.model_settings.dtype, over_adapter.autocast) == ("bfloat16", None)


def test_a_reward_models_head_is_trained_and_saved_in_fp32(
    trained_run: Trained, make_run: Any
) -> None:
    source, _ = trained_run
    config = make_run(
        model={
            "path": str(folder_of(source) / "pretrain" / "model"),
            "max_length": 64,
            "dtype": "bfloat16",
        },
        sft={"path": str(folder_of(source) / "sft" / "model")},
        reward={"tuning": "full", "steps": 2, "batch_size": 8, "eval_rows": 15},
    )
    reward_model.run(config)
    weights = load_file(folder_of(config) / "reward" / "model" / "model.safetensors")
    head = weights.pop("score.weight")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16())


def test_user_rows_replace_the_prepared_ones(make_run: Any, tmp_path: Path) -> None:
    texts, pairs = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    texts.write_text("".join(json.dumps({"text": f"line {i} " * 4}) + "\n" for i in range(80)))
    pair = {"prompt": "Q: ", "chosen": "good", "rejected": "bad"}
    pairs.write_text("".join(json.dumps(pair) + "\n" for _ in range(40)))
    data = {
        "pretrain": {"path": str(texts)},
        "sft": {"path": str(texts)},
        "preferences": {"path": str(pairs)},
    }
    config = make_run(data=data)
    shutil.rmtree(folder_of(config) / "prepare")
    assert pretrain.run(config)["rows"] == {"kept": 80}
    assert sft.run(config)["rows"] == {"kept": 80}
    summary = reward_model.run(config)
    # The last twentieth of 40 pairs is held out.
    assert (summary["pairs_train"], summary["pairs_eval"]) == (38, 2)
    counted = folder_of(config) / "data"
    assert {path.name for path in counted.iterdir()} == {
        *("pretrain.json", "sft.json", "preferences.json")
    }
    answers = json.loads((counted / "preferences.json").read_text())["answers"]
    assert (answers["texts"], answers["repeated"]) == (80, 78)


def test_max_pairs_limits_the_training_pairs(trained_run: Trained, make_run: Any) -> None:
    source, _ = trained_run
    config = make_run(
        sft={"path": str(folder_of(source) / "sft" / "model")},
        reward={"steps": 1, "batch_size": 8, "max_pairs": 30, "eval_rows": 15},
    )
    assert reward_model.run(config)["pairs_train"] == 30


def test_missing_inputs_are_named(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No model for this stage"):
        sft.run(make_run())
    config = make_run("missing", model={"path": str(tmp_path / "nowhere"), "max_length": 64})
    with pytest.raises(DataError, match="nowhere does not exist"):
        pretrain.run(config)
    unprepared = make_run("unprepared")
    shutil.rmtree(folder_of(unprepared) / "prepare")
    with pytest.raises(DataError, match="run the stage prepare first"):
        pretrain.run(unprepared)


def test_training_on_an_adapter_is_refused(trained_run: Trained, make_run: Any) -> None:
    source, _ = trained_run
    adapter = str(folder_of(source) / "sft" / "adapter")
    config = make_run(model={"path": adapter, "max_length": 64})
    with pytest.raises(DataError, match="is an adapter; the stage pretrain trains on"):
        pretrain.run(config)


def test_merge_merges_the_newest_policy(trained_run: Trained, tmp_path: Path) -> None:
    source, _ = trained_run
    config = source.model_copy(
        update={"run": source.run.model_copy(update={"dir": str(tmp_path / "merging")})}
    )
    with pytest.raises(DataError, match="run the stage ppo first"):
        merge.run(config)
    sft_model = folder_of(source) / "sft" / "model"
    model = loading.load_causal_lm(str(sft_model), config.model)
    wrapped = adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.0)
    policy = tmp_path / "merging" / "checkpoints" / "latest" / "policy"
    loading.save_adapter(wrapped, loading.load_tokenizer(str(sft_model)), policy, str(sft_model))
    summary = merge.run(config)
    assert summary["survived"] == 1.0
    assert Path(summary["base"]) == sft_model.resolve()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merging" / "merge" / "model")
    fresh = AutoModelForCausalLM.from_pretrained(sft_model)
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name])
    with pytest.raises(DataError, match="is not an adapter"):
        merge.run(config, str(sft_model))


def test_a_given_model_is_pretrained_as_it_is(make_run: Any, tmp_path: Path) -> None:
    shape = make_run("shape").model.tiny
    tiny.build(tmp_path / "given", ["some text"], shape, max_length=64, seed=5)
    config = make_run(
        model={"path": str(tmp_path / "given"), "dtype": "bfloat16", "max_length": 64}
    )
    pretrain.run(config)
    folder = folder_of(config) / "pretrain"
    assert not (folder / "base").exists()
    saved = loading.load_causal_lm(str(folder / "model"), config.model)
    assert saved.lm_head.weight.dtype == torch.bfloat16


def test_with_unfreeze_the_other_weights_stay(trained_run: Trained, make_run: Any) -> None:
    source, _ = trained_run
    base = str(folder_of(source) / "pretrain" / "model")
    keys = {"steps": 2, "batch_size": 8, "tuning": "full", "unfreeze": ["model.norm"]}
    config = make_run(model={"path": base, "max_length": 64}, sft=keys, reward=keys)
    before = load_file(f"{base}/model.safetensors")
    summary = sft.run(config)
    assert summary["trainable_parameters"] == 32
    assert {"name": "model.norm", "parameters": 32, "trainable": 32} in summary["parameter_groups"]
    tuned = load_file(folder_of(config) / "sft" / "model" / "model.safetensors")
    assert {name for name in tuned if not torch.equal(tuned[name], before[name])} == {
        "model.norm.weight"
    }
    assert reward_model.run(config)["trainable_parameters"] == 64  # the head as well
    wrong = make_run(
        "wrong", model={"path": base, "max_length": 64}, sft=keys | {"unfreeze": ["x"]}
    )
    with pytest.raises(ConfigError, match=r"sft\.unfreeze: no module of the model is named 'x'"):
        sft.run(wrong)


def test_unfreeze_without_full_tuning_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sft\.unfreeze names weights .* sft\.tuning lora"):
        resolve({"sft": {"unfreeze": ["model.norm"]}})
