"""A config that ``rlhf-ray init`` has written, run as it is."""

import json
from pathlib import Path

import pytest
import vowels
from command_line import command
from tiny_models import build_tiny

QUICK = (
    *("cluster.mode=inline", "rollout.engine=transformers", "ppo.iterations=1"),
    *("ppo.batch_size=8", "ppo.mini_batch_size=8", "evaluate.num_prompts=4"),
    *("sft.steps=1", "reward.steps=1", "rollout.max_tokens=8"),
)


def test_a_written_config_runs_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny(tmp_path / "own", vowels.TEXTS)
    pairs = [
        {"prompt": f"Ask {number}:", "chosen": "an answer", "rejected": "words"}
        for number in range(40)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert command("init", "--model", "own", "--data", "pairs.jsonl", "--gpus", "none") == 0
    assert command("run", "own.yaml", *QUICK) == 0
    summary = json.loads(Path("runs/own/ppo/summary.json").read_text())
    assert summary["samples_learnt"] == 8
    assert Path("runs/own/report.html").is_file()
