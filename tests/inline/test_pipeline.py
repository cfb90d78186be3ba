"""The whole pipeline with real tiny models in one process: prepare to report."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Refused
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.cli.arguments import read_config
from rlhf_ray.config import Config, resolve
from rlhf_ray.config.stages import DEFAULT_STAGES
from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.models.adapters import adapter_state
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.lineage import Origin, lineage
from rlhf_ray.serving import export, generate
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


def branched(finished: Config, version: str, *overrides: str) -> Config:
    """Make a branch by the command; returns its config."""
    names = [override for override in overrides if override.startswith("run.name=")]
    result = CliRunner().invoke(cli.app, ["branch", f"{finished.run.dir}@{version}", *overrides])
    assert result.exit_code == 0, result.output
    folder = Path(finished.run.dir).parent / names[0].partition("=")[2]
    assert f"Wrote {folder}, which starts from version {version} of " in result.output
    return read_config(folder, [])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_branch_without_changes_takes_the_step_that_its_run_took(finished: Config) -> None:
    old = Path(finished.run.dir)
    before = _contents(old)
    config = branched(finished, "1", "run.name=same", "run.stages=[sft, ppo]", "ppo.iterations=2")
    new = Path(config.run.dir)
    pipeline.run(config)
    ours, theirs = (
        [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()][:2]
        for run in (new, old)
    )
    assert ours[0] == theirs[0], "the record of the iteration before it"
    learnt = ("objective/", "policy/", "loss/", "val/", "response", "sampler/")
    for name, value in theirs[1].items():
        if name.startswith(learnt):
            assert ours[1][name] == value, name
    weights = Path("checkpoints/2/policy/adapter_model.safetensors")
    assert (new / weights).read_bytes() == (old / weights).read_bytes()
    assert _contents(old) == before, "a branch leaves the other run as it was"
    assert config.run.stages == ["ppo"]
    assert not (new / "changes.jsonl").exists()


def test_a_branch_says_where_it_comes_from_and_what_is_different(
    finished: Config, tmp_path: Path
) -> None:
    config = branched(finished, "1", "run.name=lower-kl", "ppo.kl_coef=0.05", "ppo.iterations=2")
    (change,) = RunFolder(config).changes()
    assert change["after"] == {"ppo": 1}
    assert change["changes"] == {"ppo.kl_coef": {"before": 0.2, "now": 0.05}}
    pipeline.run(config)
    history = lineage(config, "ppo")
    assert history.origin == Origin("run", str(Path(finished.run.dir)), 1, 1)
    assert [(each.key, each.now) for each in history.changes] == [("ppo.kl_coef", 0.05)]
    export.run(config, out=tmp_path / "e")
    card = (tmp_path / "e" / "README.md").read_text()
    assert "PPO branched from version 1 (iteration 1) of the run `run`." in card
    first, second = RunFolder(config).path.joinpath("ppo/metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["objective/kl_coef"] == 0.2
    assert json.loads(second)["objective/kl_coef"] == 0.05
    assert summary(config, "evaluate")["policy_version"] == 2
    moved = Path(config.run.dir).rename(tmp_path / "moved")
    assert generate.run(read_config(moved, []), models=["ppo"], num=1, max_tokens=2)


def test_what_cannot_be_branched_is_refused(
    finished: Config, refused: Refused, tmp_path: Path
) -> None:
    run = finished.run.dir
    refused("branch", f"{run}@1", says="run of its own: give it a name, such as run.name=run-2")
    refused("branch", run, "run.name=x", says="Name one commit to start from, as in .*@412")
    refused("branch", f"{run}@1,2", "run.name=x", says="Name one commit")
    refused("branch", f"{run}@7", "run.name=x", says="Version 7 is not kept in .* nearest is [23],")
    refused("branch", f"{run}@nine", "run.name=x", says="no version 'nine'")
    refused(
        "branch",
        f"{run}@1",
        "run.name=x",
        "ppo.gamma=0.5",
        says=r"ppo\.gamma: 1\.0 there, 0\.5 here",
    )
    refused("branch", f"{run}@1", "run.name=x", f"run.dir={run}/x", says="lies in the folder of")
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy, symlinks=True)
    refused("branch", f"{copy}@1", "run.name=x", f"run.dir={run}", says="exists; choose another")
    (copy / "checkpoints" / "1" / "state.json").unlink()
    refused(
        "branch",
        f"{copy}@1",
        "run.name=x",
        says="The whole state of version 1 is not kept in .* the nearest is 2, of 2",
    )
    state = copy / "checkpoints" / "latest" / "policy" / "learner.safetensors"
    state.write_bytes(b"X" + state.read_bytes()[1:])
    refused("branch", f"{copy}@latest", "run.name=x", says="Version [23] .* is damaged .*branch")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))


def _times(folder: Path) -> dict[str, int]:
    """Modification times of the files of a run, without those that any opening touches."""
    return {
        str(path.relative_to(folder)): os.stat(path).st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
