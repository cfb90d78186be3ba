"""The whole pipeline with real tiny models in one process: prepare to report."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from rlhf_ray.config import Config, resolve
from rlhf_ray.config.stages import DEFAULT_STAGES
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.adapters import adapter_state
from rlhf_ray.stages import pipeline

TINY = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A run of every stage, a few steps each."""
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "cluster": {"mode": "inline"},
        "model": {"max_length": 128, "tiny": TINY | {"num_layers": 1}},
        "prepare": {"num_questions": 100},
        "pretrain": {"steps": 30, "batch_size": 4, "block_size": 64, "learning_rate": 0.02},
        "sft": {"steps": 4, "batch_size": 4, "block_size": 64, "packing": "concat"},
        "reward": {"steps": 4, "batch_size": 4, "eval_rows": 8, "learning_rate": 1e-3},
        "dpo": {
            "steps": 4,
            "batch_size": 4,
            "eval_rows": 8,
            "learning_rate": 1e-2,
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "critic": {"learning_rate": 1e-3},
        "rollout": {
            "engine": "transformers",
            "max_prompt_tokens": 104,
            "max_tokens": 8,
            "shard_size": 3,
        },
        "ppo": {
            "iterations": 2,
            "batch_size": 8,
            "mini_batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-2,
            "save_every": 1,
            "eval_every": 2,
            "eval_prompts": 8,
        },
        "evaluate": {"num_prompts": 8, "bootstrap": 100},
    }
    for name, keys in sections.items():
        values[name] = values[name] | keys
    return resolve(values)


def more_iterations(config: Config, iterations: int) -> Config:
    """The config with another value of ppo.iterations."""
    values = config.model_dump()
    values["ppo"]["iterations"] = iterations
    return resolve(values)


def summary(config: Config, stage: str) -> dict[str, Any]:
    """Return a stage's summary."""
    return json.loads((Path(config.run.dir) / stage / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has gone through every stage."""
    config = make_config(tmp_path_factory.mktemp("runs") / "tiny")
    pipeline.run(config)
    return config


def test_the_run_folder_holds_what_was_promised(finished: Config) -> None:
    folder = Path(finished.run.dir)
    assert resolve(yaml.safe_load((folder / "config.yaml").read_text())) == finished
    assert (folder / "checkpoints" / "latest").resolve().name == "2"
    spans = json.loads((folder / "trace.json").read_text())
    assert {"gen", "learn", "publish"} <= {span["name"] for span in spans}
    for stage in DEFAULT_STAGES[:-1]:
        assert summary(finished, stage)
    for stage in ("pretrain", "sft", "reward", "ppo"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == {"pretrain": 30, "ppo": 2}.get(stage, 4)
    assert len((folder / "evaluate" / "samples.jsonl").read_text().splitlines()) == 8
    completions = (folder / "ppo" / "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["iteration"] for line in completions} == {1, 2}
    assert (folder / "report.html").stat().st_size > 10_000
    assert not list(folder.rglob(".*")), "no temporary file stays"


def test_the_summaries_hold_the_promised_keys(finished: Config) -> None:
    ppo = summary(finished, "ppo")
    assert ppo["iterations"] == ppo["adapter_version"] == 2
    assert ppo["samples_generated"] == ppo["samples_learnt"] == ppo["episodes"] == 16
    assert ppo["samples_requeued"] == ppo["generator_restarts"] == 0
    assert {"episodes_per_s", "reward_first", "reward_last", "kl_last", "seconds"} <= set(ppo)
    assert set(summary(finished, "reward")) >= {"pairs_train", "pairs_eval", "accuracy"}
    evaluate = summary(finished, "evaluate")
    assert set(evaluate["models"]) == {"sft", "ppo"}
    assert set(evaluate["models"]["sft"]) == {"reward_mean", "gold_mean", "perplexity"}
    assert evaluate["models"]["ppo"]["win_rate"] == evaluate["win_rate"]
    low, high = evaluate["win_rate"]["ci95"]
    assert 0 <= low <= evaluate["win_rate"]["value"] <= high <= 1


def test_the_policy_starts_on_the_reference_and_leaves_it(finished: Config) -> None:
    path = Path(finished.run.dir) / "ppo" / "metrics.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)  # the adapter starts at zero
    assert abs(second["objective/kl"]) > 1e-3
    for record in (first, second):
        # Engine and learner run the same weights in fp32.
        assert record["sampler/gap_max"] < 1e-4
        assert record["loss/value_avg"] > 0
        assert 0 < record["response_length/mean"] <= 8


def test_plain_libraries_load_the_committed_policy(finished: Config) -> None:
    folder = Path(finished.run.dir) / "checkpoints" / "latest" / "policy"
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Question: why?\n\nAnswer: ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert (adapted - base).abs().max() > 1e-4
    saved = Checkpoints(folder.parents[1], 1, {}).latest()
    assert saved is not None
    assert saved.version == 2
    committed = tensors_from_bytes(saved.policy["adapter_model.safetensors"])
    assert digest(adapter_state(model)) == digest(committed)


def test_a_second_run_skips_what_is_finished(
    finished: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(finished.run.dir)
    before = _times(folder)
    pipeline.run(finished)
    changed = {name for name, time in _times(folder).items() if before.get(name) != time}
    assert changed == {"config.yaml", "report.html", "status.json"}
    out = capsys.readouterr().out
    for stage in DEFAULT_STAGES[:-1]:
        assert f"{stage}: finished before" in out


def test_more_iterations_go_on_and_are_evaluated(finished: Config) -> None:
    folder = Path(finished.run.dir)
    before = _times(folder)
    earlier = (folder / "ppo" / "metrics.jsonl").read_text().splitlines()
    longer = more_iterations(finished, 3)
    pipeline.run(longer)
    assert summary(longer, "ppo")["adapter_version"] == 3
    assert summary(longer, "ppo")["samples_learnt"] == 24
    assert summary(longer, "evaluate")["policy_version"] == 3
    lines = (folder / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == earlier
    assert len(lines) == 3
    after = _times(folder)
    for stage in ("prepare", "pretrain", "sft", "reward"):
        assert after[f"{stage}/summary.json"] == before[f"{stage}/summary.json"]


def test_dpo_joins_the_evaluation(finished: Config) -> None:
    values = finished.model_dump()
    values["run"]["stages"] = ["dpo", "evaluate", "report"]
    values["ppo"]["iterations"] = summary(finished, "ppo")["iterations"]
    pipeline.run(resolve(values))
    evaluate = summary(finished, "evaluate")
    assert list(evaluate["models"]) == ["sft", "dpo", "ppo"]
    assert evaluate["win_rate"] == evaluate["models"]["ppo"]["win_rate"]
    lines = (Path(finished.run.dir) / "evaluate" / "samples.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"prompt", "sft", "dpo", "ppo"} for line in lines)
    assert "DPO" in (Path(finished.run.dir) / "report.html").read_text()


def test_another_run_in_the_folder_is_refused(finished: Config) -> None:
    values = finished.model_dump()
    values["ppo"]["gamma"] = 0.5
    with pytest.raises(CheckpointError, match=r"ppo\.gamma: 1\.0 there, 0\.5 now"):
        pipeline.run(resolve(values))


def test_nothing_to_resume_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path / "none", run={"dir": str(tmp_path / "none"), "resume": "must"})
    with pytest.raises(ConfigError, match="holds no run"):
        pipeline.run(config)


def _times(folder: Path) -> dict[str, int]:
    """Modification times of the files of a run, without those that any opening touches."""
    return {
        str(path.relative_to(folder)): os.stat(path).st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
