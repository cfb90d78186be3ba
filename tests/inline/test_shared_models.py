"""Roles that share a model: the same run, whoever holds it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from vowels import make_config, records

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import tiny
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_adapter
from rlhf_ray.stages import ppo


def metrics(config: Config) -> list[dict[str, float]]:
    """What each iteration logged, without times."""
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
        with pytest.raises(ConfigError, match=r"run the stage reward, or set reward.path"):
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
