"""A folder is resumed by the advice of messages, and by the shipped configs one by one."""

import ast
import json
import math
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_ray.config import Config, load, resolve
from rlhf_ray.config.identity import fixed_keys
from rlhf_ray.config.load import keys
from rlhf_ray.config.stages import STAGES, SUPERVISED
from rlhf_ray.driver.guards import WATCHED, alarms, prompt_reuse
from rlhf_ray.errors import CheckpointError, DivergenceError
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.lineage import Retuned, lineage
from rlhf_ray.stages.pipeline import open_run
from rlhf_ray.stages.supervised.ray_train import _cause
from rlhf_ray.stages.supervised.trainer import StepLog

ROOT = Path(__file__).parents[3]
KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
CONFIGS = ROOT / "configs"


def opened(folder: Path, *overrides: str, file: Path | None = None) -> Config:
    """Open the run of a folder as the command run does."""
    config = load(file, [*overrides, f"run.dir={folder}"])
    open_run(RunFolder(config), config.run.stages)
    return config


def finish(folder: Path, *stages: str) -> None:
    for stage in stages:
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "summary.json").write_text("{}")


def saved(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


COMMAND = re.compile(r"#\s+rlhf-ray run (configs/\S+)(.*)")


def test_the_configs_of_stackllama_run_in_one_folder_as_their_comments_say(tmp_path: Path) -> None:
    run, done = tmp_path / "run", []
    for name in ("prepare", "sft", "ppo_1_gpu", "ppo_1x8_a100"):
        text = (CONFIGS / "stackllama" / f"{name}.yaml").read_text()
        found = COMMAND.search(text)
        assert found, name
        file, overrides = ROOT / found[1], found[2].split()
        config = opened(run, *overrides, file=file)
        done += [stage for stage in STAGES if stage in config.run.stages]
        finish(run, *done)
        assert saved(run)["prepare"]["posts"] == "DUMP", "of which later configs say nothing"
    assert {"prepare", "sft", "ppo", "evaluate"} <= set(done)
    assert not (run / "changes.jsonl").exists()
    config = load(ROOT / "configs/stackllama/prepare.yaml", [f"run.dir={run}"])
    with pytest.raises(CheckpointError, match=r"prepare\.posts: 'DUMP' there, None now"):
        open_run(RunFolder(config), config.run.stages)


def test_a_stage_is_asked_for_by_a_config_that_says_nothing_of_finished_ones(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for stage in ("sft", "reward", "dpo", "ppo"):
        opened(run, f"run.stages=[{stage}]", f"{stage}.learning_rate=0.5", *EARLIER[stage])
        finish(run, stage)
    assert saved(run)["sft"]["steps"] == 7
    assert saved(run)["reward"]["steps"] == 8
    assert not (run / "changes.jsonl").exists()
    with pytest.raises(CheckpointError, match=r"sft\.path: None there"):
        opened(run, "run.stages=[ppo]", "sft.path=/another/model")


EARLIER = {"sft": ["sft.steps=7"], "reward": ["reward.steps=8"], "dpo": [], "ppo": []}


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_resumes_its_own_run(file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        config = opened(tmp_path / "run", file=file)
        finish(tmp_path / "run", *config.run.stages)


def test_a_change_on_resume_is_recorded_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    opened(run)
    finish(run, "prepare", "sft", "ppo")
    for version in (9, 12):
        (run / f"checkpoints/{version}").mkdir(parents=True)
        (run / f"checkpoints/{version}/state.json").write_text("{}")
    opened(run, "ppo.learning_rate=1.0e-6", "ppo.kl_coef=0.5", "ppo.save_every=7")
    (record,) = map(json.loads, (run / "changes.jsonl").read_text().splitlines())
    assert record["changes"] == {
        "ppo.learning_rate": {"before": 1.4e-5, "now": 1e-6},
        "ppo.kl_coef": {"before": 0.2, "now": 0.5},
    }
    assert record["finished"] == ["prepare", "sft", "ppo"]
    assert record["after"] == {"ppo": 12}
    assert "ppo.learning_rate 1.4e-05 -> 1e-06" in capsys.readouterr().out
    config = opened(run, "ppo.learning_rate=1.0e-6", "ppo.kl_coef=0.5")
    assert len((run / "changes.jsonl").read_text().splitlines()) == 1
    changed, _ = lineage(config, "ppo").changes
    assert changed == Retuned("ppo.learning_rate", 1.4e-5, 1e-6, {"ppo": 12})
    assert lineage(config, "sft").changes == ()


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_change_of_a_stage_that_trains_is_recorded_with_its_step(
    stage: str, tmp_path: Path
) -> None:
    opened(tmp_path)
    for step in (20, 100):
        checkpoint = tmp_path / stage / "trainer" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    config = opened(tmp_path, f"{stage}.learning_rate=1.0e-6", f"{stage}.weight_decay=0.1")
    (record,) = RunFolder(config).changes()
    assert record["after"] == {stage: 100}
    assert {*record["changes"]} == {f"{stage}.learning_rate", f"{stage}.weight_decay"}


def test_a_refused_resume_records_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    opened(run)
    finish(run, "ppo")
    with pytest.raises(CheckpointError, match=r"ppo\.gamma"):
        opened(run, "ppo.gamma=0.5", "ppo.kl_coef=0.5")
    assert not (run / "changes.jsonl").exists()
    assert saved(run)["ppo"]["kl_coef"] == 0.2


HURT = {
    "response/repeating_share": 0.9,
    "response/distinct_bigrams": 0.1,
    "objective/kl": -90.0,
    "objective/entropy": 2.0,
    "response_length/eos_share": 0.1,
    "policy/ratio_exceeded": 3.0,
    "val/ratio_minibatch_max": 99.0,
    **dict.fromkeys(WATCHED, 1e9),
}
VALUES = {
    "ppo.learning_rate": "1.0e-7",
    "critic.learning_rate": "1.0e-7",
    "ppo.kl_coef": "9.0",
    "ppo.kl_target": "1.0",
    "ppo.missing_eos_penalty": "1.0",
    "ppo.epochs": "1",
    "ppo.mini_batch_size": "128",
    "ppo.iterations": "3",
    "guards.loss_spike.action": "rollback",
    "rollout.engine_args": "{}",
    "cluster.call_timeout_s": "9.0",
    "cluster.mode": "ray",
    "placement.gpus": "0",
    "ppo.keep_checkpoints": "1",
    "ppo.max_staleness": "0",
    "ppo.save_every": "9",
    "rollout.dtype": "bfloat16",
    "rollout.engine": "transformers",
    "rollout.shard_size": "4",
}
"""What is done with each key that a message advises to change."""
AT_START = {"engines": {"reward.path", "lora.target_modules"}}
"""Keys that messages of a room name where a model is refused before the first iteration."""
ROOMS = ("driver", "generators", "cluster", "observability", "jobs", "placement", "algorithms")
ROOMS += ("rewards", "engines", "../actors")
ADVICE = re.compile(
    r"(?:[Ll]ower|[Rr]aise|[Ss]et)((?:,? (?:a |or |and )?[a-z_]+(?:\.[a-z_]+)+(?:=[\w.]+)?)+)"
)


def advised(room: str) -> set[str]:
    """Return the keys that the messages of a room advise to change."""
    found: set[str] = set()
    for file in (ROOT / "rlhf_ray" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(*(KEY.findall(match) for match in ADVICE.findall(node.value)))
    return found & set(keys())


def test_whatever_a_message_of_a_running_ppo_advises_can_be_done_on_resume(tmp_path: Path) -> None:
    changes = {key for room in ROOMS for key in advised(room) - AT_START.get(room, set())}
    assert changes >= {"ppo.kl_coef", "ppo.learning_rate", "cluster.call_timeout_s"}
    opened(tmp_path, "ppo.batch_size=128")
    finish(tmp_path, *(stage for stage in STAGES if stage != "report"))
    for key in sorted(changes):
        opened(tmp_path, "ppo.batch_size=128", f"{key}={VALUES[key]}")


def test_the_remedies_of_every_guard_can_be_followed(tmp_path: Path) -> None:
    found = alarms(resolve({}).guards, HURT, {name: [1.0] * 9 for name in WATCHED})
    assert len(found) == 4
    reuse = prompt_reuse(9, 1)
    assert reuse is not None
    known = set(keys())
    run = tmp_path / "run"
    opened(run, "ppo.batch_size=128")
    finish(run, "ppo")
    for alarm in [*found, reuse]:
        named = set(KEY.findall(alarm.text)) & known
        for key in named:
            opened(run, "ppo.batch_size=128", f"{key}={VALUES[key]}")


@pytest.mark.parametrize("stage", SUPERVISED)
def test_the_remedies_of_a_failed_training_can_be_followed(stage: str, tmp_path: Path) -> None:
    training: Any = SimpleNamespace(
        name=stage,
        settings=getattr(Config(), stage),
        metrics_file=tmp_path / "metrics.jsonl",
        evaluations_file=tmp_path / "eval.jsonl",
    )
    state: Any = SimpleNamespace(global_step=3, is_world_process_zero=False)
    logs = {"loss": math.nan, "learning_rate": 1.0, "grad_norm": 1.0}
    log = StepLog(training, lambda: False)
    with closing(log), pytest.raises(DivergenceError) as diverged:
        log.on_log(Any, state, Any, logs)  # type: ignore[arg-type]
    fixed = set(fixed_keys(Config))
    for error in (diverged.value, _cause(training, RuntimeError("CUDA out of memory"))):
        now, begins_anew, _ = str(error).partition("or begin a new run (run.resume=never)")
        assert begins_anew
        named = set(KEY.findall(now)) & set(keys())
        assert named
        assert not named & fixed


FIXED_BUT_NAMED = {"ppo.advantage", "ppo.policy_loss"}
"""Keys of functions that are refused before the first iteration."""


@pytest.mark.parametrize("room", ROOMS)
def test_no_message_of_a_running_ppo_names_a_key_that_is_fixed_by_then(room: str) -> None:
    fixed = set(fixed_keys(Config)) - FIXED_BUT_NAMED - AT_START.get(room, set())
    named: dict[str, set[str]] = {}
    for file in (ROOT / "rlhf_ray" / room).rglob("*.py"):
        tree = ast.parse(file.read_text())
        texts = [
            node.value
            for statement in ast.walk(tree)
            if isinstance(statement, ast.Raise | ast.Return | ast.Call | ast.Assign)
            for node in ast.walk(statement)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        for text in texts:
            if found := set(KEY.findall(text)) & fixed:
                named.setdefault(file.name, set()).update(found)
    assert named == {}
