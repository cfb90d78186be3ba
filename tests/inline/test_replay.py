"""One learning step again: `rlhf-ray replay` of runs of a tiny model, with what users choose."""

import json
from pathlib import Path
from typing import Any

import pytest
import vowels
from command_line import Refused, command, copy_of

from rlhf_ray.stages import pipeline
from rlhf_ray.stages.ppo import replay

OWN = """
import torch
def centred(rewards_BT, mask_BT, *, values_BT, gamma):
    to_go = rewards_BT.flip(1).cumsum(1).flip(1)
    return (to_go - values_BT) * mask_BT
def plain(logprobs, old_logprobs, advantages, mask, *, num_tokens=None, **options):
    from rlhf_ray.algorithms.losses import policy_loss
    return policy_loss(logprobs, old_logprobs, advantages, mask, num_tokens=num_tokens, **options)
"""


def ran(folder: Path, model: str, quantization: str = "none", **sections: dict[str, Any]) -> Path:
    """The folder of a run of two iterations that keeps both batches."""
    ppo = {"iterations": 2, "samples_per_prompt": 2, "mini_batch_size": 4, "eval_every": 1000}
    run = {"dir": str(folder / "run"), "stages": ["ppo"], "keep_batches": "all"}
    sections["ppo"] = ppo | sections.get("ppo", {})
    config = vowels.make_config(folder, model, **{"run": run} | sections)
    loaded = config.model.model_copy(update={"quantization": quantization})
    pipeline.run(config.model_copy(update={"model": loaded}))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    return ran(tmp_path_factory.mktemp("plain"), model)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"ppo": {"score_position": "first_pad", "importance_cap": 2.0}}, id="gae"),
        pytest.param(
            {"ppo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3"}}, id="grpo"
        ),
        pytest.param({"ppo": {"advantage": "rloo"}, "quantization": "int8"}, id="int8"),
        pytest.param({"ppo": {"advantage": "reinforce"}, "quantization": "nf4"}, id="nf4"),
        pytest.param(
            {
                "ppo": {
                    "advantage": "dr_grpo",
                    "policy_loss": "gspo",
                    "loss_aggregation": "sequence_mean",
                    "importance_cap": 2.0,
                    "importance_mask": {"level": "geometric", "high": 1.5},
                    "overlong": {"buffer": 4, "per_token": 0.01, "truncated": "mask"},
                }
            },
            id="gspo",
        ),
        pytest.param(
            {
                "ppo": {
                    "critic_warmup": 1,
                    "scheduler": "cosine",
                    "policy_loss": "cispo",
                    "epochs": 3,
                    "stop_kl": 1.0,
                    "redraw_mini_batches": True,
                    "overlong": {"truncated": "bootstrap"},
                }
            },
            id="cispo after a critic's warm-up",
        ),
        pytest.param(
            {"ppo": {"advantage": "mine_too.py:centred", "policy_loss": "mine_too.py:plain"}},
            id="users functions",
        ),
    ],
)
def test_a_step_is_reproduced_bit_for_bit(
    tmp_path: Path,
    model: str,
    sections: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_too.py").write_text(OWN)
    folder = ran(tmp_path, model, **sections)
    monkeypatch.chdir("/")  # a user's file is found from elsewhere
    for iteration in (1, 2):
        assert command("replay", folder, "--iteration", iteration) == 0
        printed = capsys.readouterr().out
        assert f"Iteration {iteration}, from version {iteration - 1}: 8 samples" in printed
        assert "Reproduced bit for bit" in printed
        assert "policy/learner.safetensors" in printed, "the weights are compared, too"
        assert ("loss/value_avg" in printed) == (folder / "checkpoints/2/critic").is_dir()


def test_a_batch_that_was_refilled_is_learnt_and_replayed_as_any_other(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards of two values: of some prompts both responses get the same."""
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, **columns):\n"
        "    return [float(len(text) % 2) for text in completions]\n"
    )
    ppo = {"advantage": "grpo", "filter_groups": {"max_refills": 3}}
    folder = ran(tmp_path, model, ppo=ppo, rollout={"shard_size": 2})
    ledger = json.loads((folder / "ppo" / "summary.json").read_text())["ledger"]
    assert ledger["filtered"] > 0
    assert ledger["learnt"] == ledger["drawn"] - ledger["filtered"] == 16
    records = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").open()]
    assert sum(2 * record["filter/replaced"] for record in records) == ledger["filtered"]
    for iteration in (1, 2):
        assert command("replay", folder, "--iteration", iteration) == 0
        assert "8 samples" in (printed := capsys.readouterr().out)
        assert "Reproduced bit for bit" in printed


def test_a_moved_run_is_replayed_where_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = copy_of(run, tmp_path)
    assert command("replay", moved, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["iteration"], result["reproduced"], result["tolerance"]) == (2, True, 0.0)
    records = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").open()]
    for name in ("loss/policy_avg", "policy/grad_norm", "loss/value_avg", "objective/kl"):
        numbers = result["numbers"][name]
        assert numbers["recorded"] == numbers["replayed"] == records[1][name]


def test_overrides_show_what_the_step_would_have_been(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("replay", run, "ppo.clip_range=0.001", "--iteration", 2) == 0
    assert "With ppo.clip_range=0.001: the largest difference is" in capsys.readouterr().out


def test_a_step_that_differs_is_no_success(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(run, tmp_path)
    path = copy / "ppo" / "batches" / "2" / "batch.json"
    values = json.loads(path.read_text())
    values["metrics"]["policy/grad_norm"] *= 1.001
    path.write_text(json.dumps(values))
    assert command("replay", copy, "--iteration", 2) == 1
    assert "Not reproduced bit for bit: the largest difference" in capsys.readouterr().out
    values["engine"] = "deepspeed"
    values["metrics"]["policy/grad_norm"] /= 1.001 * (1 + 1e-7)
    path.write_text(json.dumps(values))
    assert command("replay", copy, "--iteration", 2) == 0
    assert "Reproduced within 1e-05" in capsys.readouterr().out


def test_what_cannot_be_replayed_is_said_in_one_message(
    run: Path, tmp_path: Path, refused: Refused
) -> None:
    refused("replay", run, "--iteration", 7, says=r"Iteration 7 .* Those that can: 1, 2\.")
    copy = copy_of(run, tmp_path)
    kept = copy / "ppo" / "batches"
    (kept / "2" / "rows.npz").write_bytes((kept / "2" / "rows.npz").read_bytes()[:500])
    refused("replay", copy, "--iteration", 2, says=r"batches/2 is damaged .*\[1, 2\]")
    (kept / "1" / "policy" / "learner.safetensors").write_bytes(b"torn")
    refused("replay", copy, "--iteration", 1, says="damaged|cannot be read")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("{}")
    refused("replay", tmp_path / "empty", says="holds no batch, so no iteration can be replayed")
    refused("replay", tmp_path, says="it has no config.yaml")


@pytest.mark.parametrize(
    ("recorded", "replayed", "difference"),
    [
        (2.0, 2.0, 0.0),
        (float("nan"), float("nan"), 0.0),
        (float("inf"), float("inf"), 0.0),
        (float("inf"), 1.0, float("inf")),
        (1e-6, 2e-6, 1e-6),
        (100.0, 101.0, 1 / 101),
        ("a", "b", float("inf")),
    ],
)
def test_differences_are_relative_above_one(
    recorded: Any, replayed: Any, difference: float
) -> None:
    assert replay.Row("loss", recorded, replayed).difference == pytest.approx(difference)
