"""The recipes of docs/architecture.md, "Where to change what", followed in a copy of the code.

Each function below makes the edits that its recipe names and no other; one run then uses them all.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = {
    "run": {"stages": ["prepare", "pretrain", "sft", "count", "ppo"]},
    "cluster": {"mode": "inline"},
    "data": {"max_bad_share": 0.9},
    "model": {
        "max_length": 128,
        "tiny": {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_layers": 1,
        },
    },
    "prepare": {"num_questions": 100},
    "pretrain": {"steps": 2, "batch_size": 4, "block_size": 64},
    "sft": {"steps": 2, "batch_size": 4, "block_size": 64},
    "rollout": {"engine": "transformers", "max_prompt_tokens": 104, "max_tokens": 8},
    "rewards": [{"type": "spaces", "per_space": 3.0}],
    "ppo": {
        "iterations": 1,
        "batch_size": 8,
        "mini_batch_size": 8,
        "advantage": "halved",
        "eval_prompts": 8,
        "num_longest": 2,
    },
}


class Copy:
    """A copy of the packages that recipes are tried on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in ("rlhf_ray", "actors"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, folder / package, ignore=ignored)

    def edit(self, file: str, before: str, added: str) -> None:
        """Add lines before the line that begins with ``before``, the only one that does."""
        path = self.folder / "rlhf_ray" / file
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (at,) = [i for i, line in enumerate(lines) if line.startswith(before)]
        lines.insert(at, added)
        path.write_text("".join(lines), encoding="utf-8")

    def write(self, file: str, text: str) -> None:
        """Write a new module."""
        (self.folder / "rlhf_ray" / file).write_text(text, encoding="utf-8")

    def run(self, *arguments: str) -> str:
        """Run the copy's command line; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_ray", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def add_config_key(copy: Copy) -> None:
    copy.edit(
        "config/ppo.py",
        "    clip_range: float",
        "    num_longest: int = fixed(\n"
        '        1, unit="responses", ge=1, description="Responses that count as the longest."\n'
        "    )\n",
    )


def add_metric(copy: Copy) -> None:
    copy.edit(
        "observability/registry.py",
        '    ("response_length/max",',
        '    ("response_length/longest_mean", "tokens", _SAMPLES, "Mean of the longest."),\n',
    )
    copy.edit(
        "driver/metrics.py",
        '        "response_length/max"',
        '        "response_length/longest_mean": sum(sorted(lengths)[-2:]) / 2,\n',
    )


def add_estimator(copy: Copy) -> None:
    copy.edit(
        "algorithms/advantages.py",
        "def estimate_gae(",
        "def halved(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:\n"
        '    """Return half the reward of each token."""\n'
        "    return rewards_BT / 2 * mask_BT\n\n\n",
    )
    copy.edit(
        "config/algorithms.py",
        '    "reinforce": EstimatorEntry(',
        '    "halved": EstimatorEntry(\n'
        '        "rlhf_ray.algorithms.advantages:halved", "(half the reward)"\n'
        "    ),\n",
    )


def add_reward_source(copy: Copy) -> None:
    copy.edit(
        "config/rewards.py",
        "RewardSourceConfig = Annotated[",
        "class SpacesSourceConfig(SourceConfig):\n"
        '    """Counts spaces."""\n\n'
        '    type: Literal["spaces"] = fixed(..., description="Kind of source.")\n'
        '    per_space: float = fixed(1.0, unit="–", description="Score of a space.")\n\n\n',
    )
    copy.edit("config/rewards.py", "    | ClassifierSourceConfig", "    | SpacesSourceConfig\n")
    copy.write(
        "rewards/spaces.py",
        '"""Spaces as a reward."""\n\n\n'
        "class SpacesSource:\n"
        '    """Scores a response by its spaces."""\n\n'
        "    def __init__(self, config):\n"
        "        self._per_space = config.per_space\n\n"
        "    async def score(self, rollouts):\n"
        '        """[N] scores."""\n'
        '        return [self._per_space * row.text.count(" ") for row in rollouts]\n',
    )
    copy.edit(
        "engines/scoring.py",
        "        case RougeSourceConfig():",
        "        case SpacesSourceConfig():\n"
        "            from rlhf_ray.rewards.spaces import SpacesSource\n\n"
        "            return SpacesSource(source)\n",
    )
    copy.edit(
        "engines/scoring.py",
        "def reward_sources(",
        "from rlhf_ray.config.rewards import SpacesSourceConfig\n\n\n",
    )


def add_stage(copy: Copy) -> None:
    copy.write(
        "stages/count.py",
        '"""Counts the fine-tuned model\'s files."""\n\n'
        "from pathlib import Path\n\n"
        "from rlhf_ray.runs.folder import RunFolder\n\n\n"
        "def run(config):\n"
        '    """Write how many there are."""\n'
        "    folder = RunFolder(config)\n"
        "    files = list(Path(folder.sft_model()).iterdir())\n"
        '    folder.write_summary("count", {"files": len(files)})\n',
    )
    path = copy.folder / "rlhf_ray" / "config" / "stages.py"
    text = path.read_text(encoding="utf-8")
    assert text.count('"dpo", "ppo", "evaluate"') == 1
    path.write_text(text.replace('"dpo", "ppo"', '"dpo", "count", "ppo"'), encoding="utf-8")
    copy.edit(
        "config/stages.py",
        '    "ppo": Stage(',
        '    "count": Stage(\n'
        '        function="rlhf_ray.stages.count:run",\n'
        '        does="Count the files of the SFT model.",\n'
        '        makes="numbers",\n'
        '        sections=("sft",),\n'
        "        needs_ray=False,\n"
        "        is_default=False,\n"
        "    ),\n",
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    made = Copy(tmp_path_factory.mktemp("copy"))
    for recipe in (add_config_key, add_metric, add_estimator, add_reward_source, add_stage):
        recipe(made)
    (made.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    made.run("run", "config.yaml", "run.dir=run")
    return made


def last_metrics(copy: Copy) -> dict[str, Any]:
    return json.loads((copy.folder / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()[-1])


def test_an_added_config_key_is_in_the_resolved_config(copy: Copy) -> None:
    resolved = yaml.safe_load((copy.folder / "run" / "config.yaml").read_text())
    assert resolved["ppo"]["num_longest"] == 2


def test_an_added_metric_is_logged(copy: Copy) -> None:
    metrics = last_metrics(copy)
    assert 0 < metrics["response_length/longest_mean"] <= metrics["response_length/max"]


def test_an_added_estimator_needs_no_critic(copy: Copy) -> None:
    assert (copy.folder / "run" / "checkpoints" / "1" / "policy").is_dir()
    assert not (copy.folder / "run" / "checkpoints" / "1" / "critic").exists()


def test_an_added_reward_source_scores_under_its_name(copy: Copy) -> None:
    lines = (copy.folder / "run" / "ppo" / "completions.jsonl").read_text().splitlines()
    assert lines
    assert last_metrics(copy)["objective/scores/spaces"] >= 0


def test_an_added_stage_runs_in_its_place_and_is_a_command(copy: Copy) -> None:
    summary = json.loads((copy.folder / "run" / "count" / "summary.json").read_text())
    assert summary["files"] > 1
    assert "Count the files of the SFT model." in copy.run("--help")
