import pytest
import torch
from torch import nn

from rlhf_ray.engines.torch_engine import TorchEngine
from rlhf_ray.errors import CheckpointError


def make_engine(width: int = 3, max_grad_norm: float = 1e9) -> TorchEngine:
    """Two trained layers over a frozen one."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1))
    module[0].requires_grad_(False)
    return TorchEngine(module, learning_rate=0.1, epsilon=1e-8, max_grad_norm=max_grad_norm)


def step(engine: TorchEngine, number: int) -> float:
    """A step on data that depends on its number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 2, generator=generator)
    target = torch.randn(8, 1, generator=generator)
    engine.backward((engine.model(x) - target).square().mean(), last=True)
    return engine.step()


@pytest.mark.parametrize(("first", "then"), [(0, 3), (1, 2), (3, 4)])
def test_n_steps_then_m_equal_n_plus_m_after_a_round_trip(first: int, then: int) -> None:
    whole, begun, resumed = make_engine(), make_engine(), make_engine()
    for number in range(first + then):
        step(whole, number)
    for number in range(first):
        step(begun, number)
    with torch.no_grad():
        for parameter in resumed.module[1].parameters():
            parameter.add_(5.0)  # what a state must overwrite
    resumed.import_state(begun.export_state())
    for number in range(first, first + then):
        step(resumed, number)
    assert_same(whole.export_state(), resumed.export_state())


def test_going_back_to_a_state_undoes_later_steps() -> None:
    engine, other = make_engine(), make_engine()
    for number in range(2):
        step(engine, number)
        step(other, number)
    state = engine.export_state()
    for number in range(5):
        step(engine, 10 + number)
    engine.import_state(state)
    assert_same(engine.export_state(), other.export_state())


def test_going_back_to_the_beginning_forgets_the_moments() -> None:
    engine, fresh = make_engine(), make_engine()
    state = engine.export_state()
    step(engine, 0)
    engine.import_state(state)
    step(engine, 1)
    step(fresh, 1)
    assert_same(engine.export_state(), fresh.export_state())


def test_a_state_is_a_copy() -> None:
    engine = make_engine()
    state = engine.export_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    step(engine, 0)
    assert_same(state, before)


def test_a_state_holds_what_is_trained_and_its_moments() -> None:
    engine = make_engine()
    names = {"1.weight", "1.bias", "2.weight", "2.bias"}
    fresh = engine.export_state()
    assert set(fresh) == {"num_steps"} | {f"weight/{name}" for name in names}
    step(engine, 0)
    state = engine.export_state()
    assert int(state["num_steps"]) == 1
    moments = {f"{key}/{name}" for name in names for key in ("exp_avg", "exp_avg_sq")}
    assert set(state) == set(fresh) | moments
    # After one step of Adam: exp_avg = (1 - .9) g and exp_avg_sq = (1 - .999) g^2.
    g = state["exp_avg/2.bias"] / 0.1
    torch.testing.assert_close(state["exp_avg_sq/2.bias"], 0.001 * g**2)


def test_a_state_of_other_parameters_is_refused() -> None:
    state = make_engine().export_state()
    state["weight/3.weight"] = state.pop("weight/2.weight")
    with pytest.raises(CheckpointError, match=r"2 differ, for example 2\.weight"):
        make_engine().import_state(state)


def test_the_gradient_is_clipped_and_its_norm_told() -> None:
    free, clipped = make_engine(), make_engine(max_grad_norm=1e-3)
    assert step(free, 0) == pytest.approx(step(clipped, 0))
    norm = torch.cat([m.flatten() for n, m in clipped.export_state().items() if "exp_avg/" in n])
    assert float(norm.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_gradients_of_micro_batches_add_up() -> None:
    one, two = make_engine(), make_engine()
    x = torch.ones(4, 2)
    one.backward(one.model(x).sum(), last=True)
    two.backward(two.model(x[:1]).sum(), last=False)
    two.backward(two.model(x[1:]).sum(), last=True)
    assert one.step() == pytest.approx(two.step(), rel=1e-6)
    assert_same(one.export_state(), two.export_state(), rtol=1e-5)


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 0.0
) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * 1e-2)
