"""What a step of DeepSpeed reports, and what it is configured with."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlhf_ray.engines.deepspeed.engine import (
    FLOAT16_LOSS_SCALE,
    GROWTH_STEPS,
    DeepSpeedEngine,
    _deepspeed_config,
)


class Overflowing:
    """DeepSpeed's engine in float16: the first step overflows, and it takes none."""

    skipped_steps = 0

    def __init__(self) -> None:
        self._norms = [float("inf"), 0.5]

    def step(self) -> None:
        self._norm = self._norms.pop(0)
        self.skipped_steps += self._norm == float("inf")

    def get_global_grad_norm(self) -> float:
        return self._norm


def test_a_step_that_overflowed_in_float16_is_none_and_does_not_count() -> None:
    engine: Any = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine._engine, engine._num_steps = Overflowing(), 0
    assert engine.step() is None
    assert engine._num_steps == 0
    assert engine.step() == 0.5
    assert engine._num_steps == 1


class Scaled(SimpleNamespace):
    """DeepSpeed's optimizer and engine over no parameters; it overflows as it is told."""

    loss_scale, skipped_steps, overflows = 0.0, 0, False
    state: ClassVar[dict[Any, Any]] = {}

    def override_loss_scale(self, scale: float) -> None:
        self.loss_scale = scale

    def step(self) -> None:
        self.skipped_steps += self.overflows

    def get_global_grad_norm(self) -> float:
        return 0.5


@pytest.fixture
def critic() -> Any:
    """A critic's engine over a base in float16."""
    engine: Any = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine._engine = engine._optimizer = Scaled()
    engine._optimizer.optimizer = engine._optimizer
    engine._adam = lambda: engine._optimizer
    engine._trainable, engine._num_steps = {}, 0
    engine._zero_stage, engine._scales_loss = 2, True
    engine._optimizer.override_loss_scale(FLOAT16_LOSS_SCALE)
    return engine


def overflow(engine: Any, times: int) -> None:
    engine._engine.overflows = True
    assert [engine.step() for _ in range(times)] == [None] * times
    engine._engine.overflows = False


def test_the_loss_scale_of_a_float16_critic_has_a_floor_and_grows_again(critic: Any) -> None:
    overflow(critic, 20)
    assert critic._optimizer.loss_scale == 1
    for steps, expected in ((GROWTH_STEPS - 1, 1), (1, 2), (20 * GROWTH_STEPS, FLOAT16_LOSS_SCALE)):
        for _ in range(steps):
            critic.step()
        assert critic._optimizer.loss_scale == expected


def test_a_state_takes_the_loss_scale_back(critic: Any) -> None:
    critic.step()
    overflow(critic, 2)
    state = critic.export_state()
    overflow(critic, 3)
    critic.import_state(state)
    assert critic._optimizer.loss_scale == FLOAT16_LOSS_SCALE / 4
    critic.import_state({"num_steps": state["num_steps"]})
    assert critic._optimizer.loss_scale == FLOAT16_LOSS_SCALE


def test_gradients_that_are_discarded_lower_no_loss_scale(critic: Any) -> None:
    critic._engine.overflows = True
    critic.discard()
    assert critic._optimizer.loss_scale == FLOAT16_LOSS_SCALE


def test_gradients_that_are_not_finite_without_float16_are_no_overflow() -> None:
    engine: Any = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine._engine, engine._num_steps, engine._overflows = Overflowing(), 0, False
    assert engine.step() == float("inf")
    assert engine._num_steps == 0


def test_torchs_optimizer_may_be_offloaded() -> None:
    offload = {"zero": {"offload_optimizer": {"device": "cpu"}}}
    config: Any = _deepspeed_config(2, "bfloat16", 1.0, offload)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"] == {"stage": 2, **offload["zero"]}
