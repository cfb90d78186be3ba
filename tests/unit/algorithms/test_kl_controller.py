import pytest

from rlhf_ray.algorithms.kl_controller import AdaptiveKL, FixedKL
from rlhf_ray.errors import DivergenceError


def test_adaptive_golden() -> None:
    # n / horizon = .0256. KL 12: error clipped to .2, .2 * 1.00512. KL 0: clipped to -.2, times
    # .99488. KL 6.5: 1/12, times 1.0021333. KL -3: clipped to -.2.
    controller = AdaptiveKL(init=0.2, target=6.0, horizon=10_000)
    coefs = []
    for kl in (12.0, 0.0, 6.5, -3.0):
        controller.update(kl, num_samples=256)
        coefs.append(controller.coef)
    assert coefs == pytest.approx([0.201024, 0.199994757, 0.200421413, 0.199395255], rel=1e-8)


def test_adaptive_rests_on_target() -> None:
    controller = AdaptiveKL(init=0.2, target=6.0, horizon=10_000)
    controller.update(6.0, num_samples=256)
    assert controller.coef == 0.2


def test_fixed_never_moves() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, num_samples=256)
    assert controller.coef == 0.05


def test_a_resumed_controller_goes_on_where_it_stopped() -> None:
    whole, first = (AdaptiveKL(0.2, target=6.0, horizon=100) for _ in range(2))
    whole.update(12.0, 10)
    first.update(12.0, 10)
    second = AdaptiveKL(0.9, target=6.0, horizon=100)
    second.load_state_dict(first.state_dict())
    whole.update(1.0, 10)
    second.update(1.0, 10)
    assert second.coef == whole.coef != 0.2
    fixed = FixedKL(0.1)
    fixed.load_state_dict(FixedKL(0.3).state_dict())
    assert fixed.coef == 0.3


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_a_kl_that_is_not_finite_stops_the_run_and_spares_the_coefficient(kl: float) -> None:
    controller = AdaptiveKL(0.2, target=6.0, horizon=100)
    with pytest.raises(DivergenceError, match="KL of 8 samples"):
        controller.update(kl, 8)
    assert controller.coef == 0.2


def test_impossible_settings_are_refused() -> None:
    for coef in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="coefficient must be finite and >= 0"):
            FixedKL(coef)
    with pytest.raises(ValueError, match="target and horizon must be > 0, got 0 and 10"):
        AdaptiveKL(0.1, target=0, horizon=10)
    with pytest.raises(ValueError, match="target and horizon"):
        AdaptiveKL(0.1, target=1, horizon=0)
