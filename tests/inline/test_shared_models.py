"""Roles that share a model: the same run, whoever holds it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vowels import make_config, records

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.engines.torch_engine import TorchEngine
from rlhf_ray.engines.transformers_engine import TransformersEngine
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import tiny
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_adapter
from rlhf_ray.stages.ppo import stage as ppo


def metrics(config: Config) -> list[dict[str, float]]:
    """Return each iteration's metrics without times."""
    clock = ("timing_s/", "throughput/", "generators/")
    return [
        {name: value for name, value in record.items() if not name.startswith(clock)}
        for record in records(config)
    ]


def test_a_reference_that_is_the_policys_base_changes_nothing(model: str, tmp_path: Path) -> None:
    own = make_config(tmp_path / "own", model)
    shared = make_config(tmp_path / "shared", model, reference={"kind": "policy_base"})
    summaries = [ppo.run(config) for config in (own, shared)]
    assert metrics(own) == metrics(shared)
    assert summaries[0]["kl_last"] == summaries[1]["kl_last"]
    assert max(record["objective/kl"] for record in metrics(own)) > 0.01  # the policy did move
    traced = [(Path(c.run.dir) / "trace.json").read_text() for c in (own, shared)]
    assert ["reference-0" in text for text in traced] == [True, False]


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep, an engine has no weights; what it then computes is not a number."""
    stashed: dict[int, dict[str, torch.Tensor]] = {}

    def lay_down(module: torch.nn.Module) -> None:
        named = module.named_parameters()
        base = {name: p.data for name, p in named if not ("lora_" in name or "score" in name)}
        assert base
        stashed[id(module)] = {name: weight.clone() for name, weight in base.items()}
        for weight in base.values():
            weight.fill_(float("nan"))

    def pick_up(module: torch.nn.Module) -> None:
        for name, weight in stashed.pop(id(module)).items():
            module.get_parameter(name).data.copy_(weight)

    async def sleep(engine: TransformersEngine) -> None:
        lay_down(engine._slot.model)

    async def wake(engine: TransformersEngine) -> None:
        if id(engine._slot.model) in stashed:  # not at its start
            pick_up(engine._slot.model)

    monkeypatch.setattr(TorchEngine, "sleep", lambda engine: lay_down(engine.module))
    monkeypatch.setattr(TorchEngine, "wake", lambda engine: pick_up(engine.module))
    monkeypatch.setattr(TransformersEngine, "sleep", sleep)
    monkeypatch.setattr(TransformersEngine, "wake", wake)


def test_turns_on_one_gpu_change_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful(monkeypatch)
    apart = make_config(tmp_path / "apart", model, ppo={"iterations": 2})
    turns = make_config(
        tmp_path / "turns", model, ppo={"iterations": 2}, placement={"gpus": 0.5, "turns": True}
    )
    for config in (apart, turns):
        ppo.run(config)
    assert metrics(apart) == metrics(turns)
    assert wakings(apart) == []
    # The proof's two adapters; the first publication and evaluation; each iteration's rollouts,
    # after which the policy learns; the last publication and evaluation.
    assert wakings(turns) == ["generator", "policy"] * (2 + 1 + 2 + 1)


def wakings(config: Config) -> list[str]:
    """Generator and policy, each as often as it woke up, in order."""
    events = json.loads((Path(config.run.dir) / "trace.json").read_text())
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    woken = sorted((e for e in events if e["name"] == "wake"), key=lambda event: event["ts"])
    names = [rows[event["tid"]].rpartition("-")[0] for event in woken]
    return [name for name in names if name != "critic"]


class TestCriticFromTheRewardModel:
    def test_it_learns_with_rewards_of_another_source(self, model: str, tmp_path: Path) -> None:
        classifier = load_sequence_classifier(model, ModelConfig(), seed=5)
        wrapped = attach(classifier, LoraConfig(r=2), "SEQ_CLS", seed=3, dropout=0.0)
        save_adapter(wrapped, load_tokenizer(model), tmp_path / "reward", model)
        critic = {"init": "reward", "learning_rate": 1e-2}
        reward = {"path": str(tmp_path / "reward")}
        config = make_config(tmp_path / "run", model, critic=critic, reward=reward)
        zero = make_config(tmp_path / "zero", model, critic={"learning_rate": 1e-2})
        for each in (config, zero):
            ppo.run(each)
        # Both see the same first responses; what they expect of them differs.
        first, other = metrics(config)[0], metrics(zero)[0]
        assert first["objective/scores"] == other["objective/scores"]
        assert first["loss/value_avg"] != pytest.approx(other["loss/value_avg"], rel=0.01)
        committed = Path(config.run.dir) / "checkpoints" / "latest" / "critic"
        assert "score" in "".join(load_file(committed / "adapter_model.safetensors"))

    def test_it_needs_a_reward_model(self, model: str, tmp_path: Path) -> None:
        config = make_config(tmp_path / "run", model, critic={"init": "reward"})
        with pytest.raises(ConfigError, match=r"Run the stage reward, or set reward.path"):
            ppo.run(config)

    def test_it_reads_the_policys_tokens(self, model: str, tmp_path: Path) -> None:
        shape = TinyModelConfig(vocab_size=310, hidden_size=32, num_heads=2, num_layers=1)
        tiny.build(tmp_path / "other", ["quite other words"], shape, 64, seed=0)
        path = str(tmp_path / "other")
        config = make_config(
            tmp_path / "run", model, critic={"init": "reward"}, reward={"path": path}
        )
        with pytest.raises(DataError, match=r"cannot be the critic: its tokenizer is not the pol"):
            ppo.run(config)
