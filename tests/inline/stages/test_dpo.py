"""Direct preference optimisation on a tiny model, inline."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from rlhf_ray.config import Config
from rlhf_ray.config.stages import DEFAULT_STAGES
from rlhf_ray.config.supervised import DpoConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import loading
from rlhf_ray.models.token_logprobs import answer_with_logprobs, position_ids
from rlhf_ray.stages.supervised import dpo
from rlhf_ray.stages.supervised.dpo import DpoTraining, completion_logprobs
from rlhf_ray.stages.supervised.pairs import load_training_pairs

Trained = tuple[Config, dict[str, Any]]


@pytest.fixture
def make_dpo(trained_run: Trained, make_run: Any) -> Any:
    """Configs whose SFT model is that of the trained run."""
    sft_model = str(Path(trained_run[0].run.dir) / "sft" / "model")

    def make(**keys: Any) -> Config:
        settings = {"steps": 20, "batch_size": 8, "learning_rate": 0.01, "eval_rows": 15} | keys
        return make_run(sft={"path": sft_model}, dpo=settings)

    return make


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_chosen_answers_become_likelier(make_dpo: Any, loss: str) -> None:
    config = make_dpo(loss=loss)
    summary = dpo.run(config)
    written = Path(config.run.dir) / "dpo" / "summary.json"
    assert json.loads(written.read_text()) == summary
    # The adapter starts at nothing: every log-ratio is 0.
    start = math.log(2) if loss == "sigmoid" else (1 / (2 * config.dpo.beta)) ** 2
    assert summary["loss_before"] == pytest.approx(start, rel=1e-5)
    assert summary["loss_after"] < 0.7 * start
    assert summary["accuracy"] > 0.9
    assert (summary["pairs_train"], summary["pairs_eval"]) == (100, 15)
    model = AutoPeftModelForCausalLM.from_pretrained(Path(config.run.dir) / "dpo" / "model")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_completions_are_counted_whole_and_without_their_prompt(make_dpo: Any) -> None:
    config = make_dpo()
    training = DpoTraining(config, Path(config.run.dir), config.sft.path)
    pairs, _ = load_training_pairs(training)
    rows = list(pairs["held_out"])[:3]
    rows[0]["chosen_ids"] = rows[0]["chosen_ids"] + rows[0]["chosen_ids"][-3:]  # unequal lengths
    model = answer_with_logprobs(loading.load_causal_lm(training.base, config.model))
    with torch.no_grad():
        together_BP = completion_logprobs(model, training.collate(rows))
        for row, sides in zip(rows, together_BP, strict=True):
            for key, value in zip(("chosen_ids", "rejected_ids"), sides, strict=True):
                ids = torch.tensor([row[key]])
                logprobs = model(ids).logits[0].log_softmax(-1)
                first = row["num_prompt_tokens"]
                expected = sum(
                    float(logprobs[place - 1, ids[0, place]])
                    for place in range(first, ids.shape[1])
                )
                assert float(value) == pytest.approx(expected, abs=1e-4)
    prompt = loading.load_tokenizer(training.base).decode(
        rows[1]["chosen_ids"][: rows[1]["num_prompt_tokens"]]
    )
    assert prompt.startswith("Q: ")
    assert prompt.endswith("A: ")


def test_dpo_leaves_the_base_unchanged(make_dpo: Any) -> None:
    config = make_dpo(steps=3)
    dpo.run(config)
    path = str(Path(config.run.dir) / "dpo" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    tuned = loading.load_causal_lm(path, config.model)
    base = loading.load_causal_lm(config.sft.path or "", config.model)
    with torch.no_grad():
        positions = position_ids(torch.ones_like(ids))
        assert not torch.equal(tuned(ids).logits, base(ids).logits)
        with tuned.disable_adapter():
            torch.testing.assert_close(
                tuned(ids, position_ids=positions).logits, base(ids).logits, rtol=0, atol=0
            )


def test_smoothing_is_refused_for_ipo(make_dpo: Any) -> None:
    with pytest.raises(ConfigError, match=r"dpo.label_smoothing 0.1 needs dpo.loss sigmoid"):
        make_dpo(loss="ipo", label_smoothing=0.1)


def test_dpo_is_no_default_stage(make_run: Any) -> None:
    assert "dpo" not in DEFAULT_STAGES
    assert "dpo" not in make_run().run.stages


def test_ipo_takes_sums_as_its_paper_or_means_over_tokens_as_trl(make_dpo: Any) -> None:
    config = make_dpo(loss="ipo", beta=0.5)
    training = DpoTraining(config, Path(config.run.dir), config.sft.path)
    rows = list(load_training_pairs(training)[0]["held_out"])[:3]
    rows[0]["chosen_ids"] = rows[0]["chosen_ids"] + rows[0]["chosen_ids"][-3:]  # unequal lengths
    model: Any = training.load_model().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        batch = training.collate(rows)
        own_BP = completion_logprobs(model, batch)
        with model.disable_adapter():
            ratios_BP = own_BP - completion_logprobs(model, batch)
        lengths_BP = torch.tensor(
            [
                [
                    len(row[f"{side}_ids"]) - row["num_prompt_tokens"]
                    for side in ("chosen", "rejected")
                ]
                for row in rows
            ]
        )
        assert lengths_BP[0, 0] != lengths_BP[0, 1]
        found = {}
        for per_token, used_BP in ((False, ratios_BP), (True, ratios_BP / lengths_BP)):
            settings = config.dpo.model_copy(update={"per_token": per_token})
            changed = config.model_copy(update={"dpo": settings})
            loss, rewards_BP = DpoTraining(
                changed, Path(config.run.dir), config.sft.path
            ).predict_rows(model, batch)
            expected = (used_BP[:, 0] - used_BP[:, 1] - 1 / (2 * 0.5)).square().mean()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(rewards_BP, 0.5 * used_BP)
            found[per_token] = loss.item()
    assert found[True] != pytest.approx(found[False], rel=1e-3)


def test_means_over_tokens_are_for_ipo_alone() -> None:
    with pytest.raises(ValueError, match=r"dpo\.per_token needs dpo\.loss ipo, got sigmoid"):
        DpoConfig(per_token=True)
