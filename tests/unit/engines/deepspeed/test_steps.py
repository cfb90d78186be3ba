"""What a step of DeepSpeed reports, and what it is configured with."""

from typing import Any

from rlhf_ray.engines.deepspeed.engine import DeepSpeedEngine, _deepspeed_config


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
