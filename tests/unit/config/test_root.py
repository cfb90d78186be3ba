"""Top-k and top-p where engine and learner round their weights differently."""

import pytest

from rlhf_ray.config.load import load
from rlhf_ray.errors import ConfigError

ROUNDED = [
    ["model.dtype=bfloat16"],
    ["rollout.dtype=bfloat16"],
    ["model.quantization=nf4"],
]


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("cut", ["rollout.top_k=50", "rollout.top_p=0.9"])
def test_it_needs_the_weights_that_correct_it(precision: list[str], cut: str) -> None:
    key, _, value = cut.partition("=")
    with pytest.raises(ConfigError, match=rf"{key} {value} .* Set ppo\.importance_cap"):
        load(None, [*precision, cut])
    config = load(None, [*precision, cut, "ppo.importance_cap=2.0"])
    assert not config.engine_is_exact


def test_equal_float32_weights_need_nothing() -> None:
    rollout = load(None, ["rollout.top_k=50", "rollout.top_p=0.9"]).rollout
    assert (rollout.top_k, rollout.top_p) == (50, 0.9)


@pytest.mark.parametrize("precision", ROUNDED)
def test_nothing_is_cut_off_by_default(precision: list[str]) -> None:
    rollout = load(None, precision).rollout
    assert (rollout.top_k, rollout.top_p) == (0, 1.0)


@pytest.mark.parametrize("target", ["ppo.kl_target=6", "ppo.kl_target_per_token=0.1"])
def test_a_batch_of_five_horizons_is_refused_because_the_coefficient_would_turn_negative(
    target: str,
) -> None:
    other = [] if "per_token" not in target else ["ppo.kl_target=null"]
    keys = [*other, target, "ppo.batch_size=640", "ppo.kl_horizon=128"]
    with pytest.raises(ConfigError, match=r"batch_size 640 is at least 5 times ppo.kl_horizon 128"):
        load(None, keys)
    load(None, [*keys, "ppo.kl_horizon=129"])
    load(None, [*keys, "ppo.kl_coef=0"])
    load(None, ["ppo.batch_size=640", "ppo.kl_horizon=128", "ppo.kl_target=null"])
