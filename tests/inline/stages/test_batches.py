"""Batches as they reach the model: padded pairs and packed blocks; counts of pairs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf_ray.config import Config
from rlhf_ray.config.supervised import RewardConfig, SftConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import forward, loading
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.stages.supervised import dpo, sft
from rlhf_ray.stages.supervised import reward as reward_model
from rlhf_ray.stages.supervised.language_model import packed_blocks
from rlhf_ray.stages.supervised.reward import RewardTraining

Trained = tuple[Config, dict[str, Any]]


def folder_of(config: Config) -> Path:
    return Path(config.run.dir)


def test_reward_loss_and_scores_of_a_padded_batch(trained_run: Trained) -> None:
    source, _ = trained_run
    reward = source.reward.model_copy(update={"centre": 0.5})
    config = source.model_copy(update={"reward": reward})
    training = RewardTraining(config, folder_of(config), str(folder_of(config) / "sft" / "model"))
    model = training.load_model().eval()
    rows = [
        {"chosen_ids": [5, 6, 7, 1], "rejected_ids": [5, 1], "num_prompt_tokens": 1},
        {"chosen_ids": [8, 1], "rejected_ids": [9, 10, 1], "num_prompt_tokens": 0},
    ]
    batch = training.collate(rows)
    assert batch["input_ids"].tolist() == [
        [[5, 6, 7, 1], [5, 1, 0, 0]],
        [[8, 1, 0, 0], [9, 10, 1, 0]],
    ]
    assert batch["attention_mask"].sum(-1).tolist() == [[4, 2], [2, 3]]
    with torch.no_grad():
        loss, scores_BP = training.predict_rows(model, batch)
        alone = [
            forward.sequence_scores(model, torch.tensor([ids]), torch.ones(1, len(ids))).item()
            for row in rows
            for ids in (row["chosen_ids"], row["rejected_ids"])
        ]
    torch.testing.assert_close(scores_BP.flatten(), torch.tensor(alone))
    c1, r1, c2, r2 = alone
    expected = (math.log(1 + math.exp(r1 - c1)) + math.log(1 + math.exp(r2 - c2))) / 2
    expected += 0.5 * ((c1 + r1) ** 2 + (c2 + r2) ** 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_ties_count_as_wrong(make_run: Any, tmp_path: Path) -> None:
    scores_BP = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [2.0, 1.0]]).numpy()
    measured = RewardTraining(make_run(), tmp_path, "base").measure(scores_BP)
    # -log sigmoid of the gaps 1, 0, -1, 1.
    gaps = (1, 0, -1, 1)
    loss = sum(math.log(1 + math.exp(-gap)) for gap in gaps) / 4
    assert measured == {"accuracy": 0.5, "held_out_loss": pytest.approx(loss, rel=1e-6)}


def test_blocks_hold_out_the_last_twentieth() -> None:
    texts = {"token_ids": [[i, i, i, 0] for i in range(1, 41)], "learnt": [[0, 1, 1, 1]] * 40}
    documents = Dataset.from_dict(texts)
    settings = SftConfig(block_size=8, eval_rows=10, packing="concat")
    blocks = packed_blocks("sft", documents, settings, pad_id=99)
    assert blocks["train"]["input_ids"][-1] == [37, 37, 37, 0, 38, 38, 38, 0]
    assert list(blocks["held_out"]["input_ids"]) == [[39, 39, 39, 0, 40, 40, 40, 0]]
    large = settings.model_copy(update={"block_size": 64})
    with pytest.raises(DataError, match=r"2 texts fill no block of 64 tokens \(held-out part\)"):
        packed_blocks("sft", documents, large, pad_id=99)


def test_blocks_of_isolated_texts_reach_the_model_with_their_positions(
    make_run: Any, tmp_path: Path
) -> None:
    texts = {"token_ids": [[5, 6, 7], [8, 9]] * 20, "learnt": [[0, 1, 1], [0, 1]] * 20}
    settings = SftConfig(block_size=8, eval_rows=10)
    blocks = packed_blocks("sft", Dataset.from_dict(texts), settings, pad_id=99)
    training = sft.SftTraining(make_run(), tmp_path, "base")
    batch = training.collate([blocks["train"][0], blocks["train"][1]])
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 9, 5, 6, 7]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch["labels"][0].tolist() == [-100, 6, 7, -100, 9, -100, 6, 7]
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    flash = make_run("flash", model={"attn_implementation": "flash_attention_2", "max_length": 64})
    flat = sft.SftTraining(flash, tmp_path, "base").collate([blocks["train"][0]] * 2)
    assert {tuple(tensor.shape) for tensor in flat.values()} == {(1, 16)}


def test_without_packing_a_batch_is_padded_and_its_texts_have_the_loss_of_isolated_ones(
    trained_run: Trained, make_run: Any
) -> None:
    source, _ = trained_run
    base = str(folder_of(source) / "pretrain" / "model")
    model = loading.load_causal_lm(base, source.model)
    texts = [list(range(10 + i, 10 + i + 3 + i % 9)) for i in range(40)]
    documents = Dataset.from_dict({"token_ids": texts, "learnt": [[1] * len(t) for t in texts]})
    losses, means = [], []
    for packing in ("isolate", "none"):
        config = make_run(packing, sft={"packing": packing, "block_size": 16})
        training = sft.SftTraining(config, folder_of(config), base)
        blocks = packed_blocks("sft", documents, config.sft, pad_id=0)["train"]
        batch = training.collate(list(blocks))
        if packing == "none":
            assert batch["input_ids"].shape == (38, 11)  # the longest text, not the block
            assert batch["input_ids"][0].tolist() == [10, 11, 12] + [0] * 8
            assert batch["labels"][0].tolist() == [-100, 11, 12] + [-100] * 8
        with torch.no_grad():
            means.append(model(**batch).loss.item())
            _, sums_B2 = training.predict_rows(model, batch)
        losses.append(sums_B2.sum(0))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-6)
    assert losses[0][1] == sum(len(text) - 1 for text in texts[:38])
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_blocks_of_which_nothing_is_learnt_are_left_out() -> None:
    # The first text's block holds a prompt alone; the first token of a block is never predicted.
    learnt = [[1] + [0] * 15, [0] * 15 + [1]]
    texts = {"token_ids": [list(range(16))] * 4, "learnt": learnt * 2}
    settings = SftConfig(block_size=8, packing="concat")
    blocks = packed_blocks("sft", Dataset.from_dict(texts), settings, pad_id=99)
    assert blocks["train"]["labels"][:] == [[-100] * 7 + [15]]


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_accumulated_batches_of_unequal_size_count_by_their_rows(
    trained_run: Trained, make_run: Any, stage: str
) -> None:
    """Seven pairs, four a step: the second step's batches have two pairs and one."""
    sft_model = str(folder_of(trained_run[0]) / "sft" / "model")
    losses = []
    for accumulate in (1, 2):
        keys = {
            "steps": 2,
            "batch_size": 4,
            "learning_rate": 0.05,
            "max_pairs": 7,
            "lora": {"dropout": 0.0},
            "trainer": {"gradient_accumulation_steps": accumulate},
        }
        config = make_run(f"{stage}{accumulate}", sft={"path": sft_model}, **{stage: keys})
        {"reward": reward_model.run, "dpo": dpo.run}[stage](config)
        losses.append(
            [row["loss"] for row in read_jsonl(folder_of(config) / stage / "metrics.jsonl")]
        )
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_margin_is_subtracted_from_the_gap(trained_run: Trained) -> None:
    source, _ = trained_run
    base = str(folder_of(source) / "sft" / "model")
    rows = [{"chosen_ids": [5, 6, 7, 1], "rejected_ids": [5, 1], "num_prompt_tokens": 1}]
    losses = []
    for margin in (0.0, 2.0):
        config = source.model_copy(
            update={"reward": source.reward.model_copy(update={"margin": margin})}
        )
        training = RewardTraining(config, folder_of(config), base)
        loss, scores_BP = training.predict_rows(
            training.load_model().eval(), training.collate(rows)
        )
        gap = float(scores_BP[0, 0] - scores_BP[0, 1])
        assert loss.item() == pytest.approx(math.log(1 + math.exp(margin - gap)), rel=1e-5)
        losses.append(loss.item())
    assert losses[1] > losses[0] + 1
    with pytest.raises(ValueError, match=r"reward\.margin needs pairs"):
        RewardConfig(loss="bce", margin=1.0)
