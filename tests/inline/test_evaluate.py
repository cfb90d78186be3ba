"""The stage evaluate over a finished run: other versions, other runs' policies, several judges."""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from command_line import Refused, command, copy_of
from json_server import chat_completion, serve

from rlhf_ray.config import load
from rlhf_ray.engines.served_adapters import tensors_from_bytes, tensors_to_bytes
from rlhf_ray.models.folders import base_of, record_base
from rlhf_ray.stages import pipeline

TOLD = [
    {"prompt": "Say a.", "check": "at_least_words", "args": {"num": 1}},
    {"prompt": "Say b.", "check": "at_least_words", "args": {"num": 99}},
]


def prefers_longer(number: int, body: Any) -> tuple[int, Any]:
    question = body["messages"][0]["content"]
    a, b = re.findall(r"<response [AB]>\n(.*?)\n</response", question, re.DOTALL)
    return 200, chat_completion(f"Better: {'A' if len(a) > len(b) else 'B'}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def louder(policy: Path, folder: Path) -> str:
    """A copy of a policy whose adapter changes its base much more; the base stays where it is."""
    shutil.copytree(policy, folder)
    record_base(folder, base_of(str(policy)))
    file = folder / "adapter_model.safetensors"
    state = tensors_from_bytes(file.read_bytes())
    file.write_bytes(
        tensors_to_bytes(
            {name: tensor * (300 if "lora_B" in name else 1) for name, tensor in state.items()}
        )
    )
    return str(folder)


def test_versions_and_another_runs_policy_by_three_judges(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(whole_run, tmp_path)
    other = louder(whole_run / "checkpoints" / "latest" / "policy", tmp_path / "other")
    told = tmp_path / "told.jsonl"
    told.write_text("\n".join(map(json.dumps, TOLD)))
    with serve(prefers_longer) as server:
        asked = (
            *(run, f"run.dir={run}", f"evaluate.models=[ppo, ppo@1, {other}]"),
            *("evaluate.judged_by=[judge, rouge, gold]", f"evaluate.judge.url={server.url}"),
            *("evaluate.judge.model=m", f"evaluate.instructions={told}"),
        )
        assert command("run", *asked) == 0
        num_asked = len(server.requests)
        assert command("run", *asked) == 0
        assert len(server.requests) == num_asked, "what was asked for is there already"
    samples = lines(run / "evaluate" / "samples.jsonl")
    summary = json.loads((run / "evaluate" / "summary.json").read_text())
    assert list(summary["models"]) == ["sft", "ppo", "ppo@1", other]
    assert list(summary["judges"]) == ["judge", "rouge", "gold"]
    for judge in summary["judges"].values():
        # The same policy under other names: the same texts, ties, equal ratings.
        rate = judge["win_rates"]["ppo"]["ppo@1"]
        assert rate["value"] == 0.5
        assert sum(rate["ci95"]) == pytest.approx(1.0)
        assert judge["elo"]["ppo"]["value"] == pytest.approx(judge["elo"]["ppo@1"]["value"])
        assert judge["elo"]["sft"]["value"] == 1000
    texts = [[sample[name]["text"] for name in summary["models"]] for sample in samples]
    # Where lengths are equal, the judge follows the order, and that is a tie.
    longer = [0.5 * ((len(row[3]) >= len(row[0])) + (len(row[3]) > len(row[0]))) for row in texts]
    assert summary["models"][other]["win_rate"]["value"] == sum(longer) / 8
    unequal = sum(a != b for row in texts for a, b in combinations(row, 2))
    assert num_asked == 2 * unequal > 0, "each pair in both orders; equal texts are ties unasked"
    assert summary["win_rate"] == summary["models"]["ppo"]["win_rate"]
    assert summary["models"][other]["perplexity"] > 1.02 * summary["models"]["sft"]["perplexity"]
    for name, model in summary["models"].items():
        assert model["instruction_pass_rate"] <= 0.5
        assert model["rouge_mean"] == pytest.approx(sum(s[name]["rouge"] for s in samples) / 8)
    followed = lines(run / "evaluate" / "instructions.jsonl")
    assert [row["models"]["ppo"]["pass_rate"] for row in followed][1] == 0.0
    (record,) = lines(run / "evaluate" / "metrics.jsonl")
    assert record["step"] == summary["policy_version"] == 1
    assert record["win_rate/ppo_1"] == summary["models"]["ppo@1"]["win_rate"]["value"]
    assert "8 held-out prompts, judged by judge" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_refused_with_what_exists(
    whole_run: Path, tmp_path: Path, refused: Refused
) -> None:
    run = copy_of(whole_run, tmp_path)

    def says(models: str, message: str, command: str = "evaluate") -> None:
        refused(command, run, f"run.dir={run}", f"evaluate.models=[{models}]", says=message)

    there = r"The run has sft, ppo, ppo@1(, ppo@best)?$"
    says("ppo@7", r"evaluate\.models names ppo@7, which is neither .* nor a folder\. " + there)
    says("dpo", r"evaluate\.models names dpo, which is neither .*\. " + there)
    says("sft", r"names sft alone, which leaves nothing to compare; the run has sft, ppo, ppo@1")
    says(
        "nowhere",
        "nowhere is not a model of the run and not a folder; give sft, dpo, ppo",
        command="run",
    )
    says(f"{run}/sft/model", r"which is no adapter \(adapter_config\.json and")
    says(f"{run}/reward/model", r"an adapter with task_type SEQ_CLS; CAUSAL_LM is needed")
    elsewhere = tmp_path / "policy"
    shutil.copytree(run / "checkpoints" / "latest" / "policy", elsewhere)
    (elsewhere / "base_model.json").write_text(json.dumps({"path": str(run / "pretrain/model")}))
    says(f"{elsewhere}", r"an adapter on .*/pretrain/model, which is not the run's SFT model")


def test_what_a_judge_or_an_instruction_needs_is_refused_before_anything_is_sampled(
    whole_run: Path, tmp_path: Path, refused: Refused
) -> None:
    run = copy_of(whole_run, tmp_path)
    ours = (run, f"run.dir={run}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Question: {i}?"}) + "\n" for i in range(9)))
    own = tmp_path / "own"
    shutil.copytree(run / "checkpoints", own / "checkpoints")
    models = (f"sft.path={run}/sft/model", f"reward.path={run}/reward/model")
    theirs = (run, f"run.dir={own}", *models, f"data.eval.path={rows}")
    refused("evaluate", *theirs, "evaluate.judged_by=[gold]", says="known of the synthetic site's")
    refused(
        "evaluate", *theirs, "evaluate.judged_by=[rouge]", says="none of the 8 held-out prompts"
    )
    told = tmp_path / "told.jsonl"
    told.write_text(json.dumps({"prompt": "word " * 60, "check": "lower_case"}))
    refused(
        *("evaluate", *ours, f"evaluate.instructions={told}"),
        says=r"evaluate\.instructions: .* has \d+ tokens, and .* leaves 56; shorten it, or raise",
    )
    refused(
        *("run", *ours, f"evaluate.instructions={tmp_path}/none.jsonl"),
        says=r"evaluate\.instructions: .*none\.jsonl cannot be read",
    )


def test_a_line_of_metrics_for_each_policy_that_was_evaluated(
    whole_run: Path, tmp_path: Path
) -> None:
    run = copy_of(whole_run, tmp_path)
    overrides = [f"run.dir={run}", "run.stages=[ppo,evaluate]"]
    pipeline.run(load(run / "config.yaml", [*overrides, "ppo.iterations=2"]))
    records = lines(run / "evaluate" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert all({"win_rate/ppo", "elo/ppo", "gold_mean/sft"} <= set(record) for record in records)


def test_models_are_compared_at_a_temperature_of_their_own(whole_run: Path, tmp_path: Path) -> None:
    """Near zero only the likeliest tokens are drawn, whatever the temperature is exactly."""
    run = copy_of(whole_run, tmp_path)
    answers = {}
    for temperature in ("null", "0.001", "0.0005"):
        asked = (run, f"run.dir={run}", f"evaluate.temperature={temperature}")
        assert command("run", *asked) == 0  # evaluates again where another temperature is asked for
        rows = lines(run / "evaluate" / "samples.jsonl")
        answers[temperature] = [row["sft"]["text"] for row in rows]
    assert answers["0.001"] == answers["0.0005"] != answers["null"]
